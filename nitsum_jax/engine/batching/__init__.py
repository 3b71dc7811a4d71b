"""Which requests join a batch, in which order and at which pace, and what happens when steps end or fail."""
