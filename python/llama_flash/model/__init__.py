"""What a model file says, and what the engine makes of it before anything is loaded."""
