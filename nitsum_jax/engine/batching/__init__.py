"""Who joins a batch, in which order, at whose pace, and what happens when steps end or fail."""
