"""Which layout is best for a load: candidates, predictions, replays, and when to decide."""
