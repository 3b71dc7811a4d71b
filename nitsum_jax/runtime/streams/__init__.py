"""From the engine's token deltas to the text that a client reads."""
