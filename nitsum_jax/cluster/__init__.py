"""Many cells behind one front door: placement by Ray Serve, and streams that go on when a cell does not."""
