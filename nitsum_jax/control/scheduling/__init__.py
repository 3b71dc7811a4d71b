"""Which request is next, where it goes, and how long its chunks are."""
