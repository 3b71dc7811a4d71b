"""Models that --model takes by name."""
