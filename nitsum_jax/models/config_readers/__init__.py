"""From the words of a checkpoint to a `ModelConfig`: one reader for each format."""
