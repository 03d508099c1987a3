"""What has happened, in numbers and pictures: reads only."""
