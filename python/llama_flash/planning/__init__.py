"""What a load would come to: which weights go to flash, what that needs, and what a token costs."""
