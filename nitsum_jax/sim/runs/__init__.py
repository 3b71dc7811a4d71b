"""One run: simulating it, its logs, its metrics, and checks of both."""
