"""Which replicas a deployment has, as this process learns it from Ray Serve's router."""

import threading
from collections.abc import Callable

Listener = Callable[[frozenset[str]], None]


class ReplicaDirectory:
    """Who wants to know which replicas a deployment has, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: frozenset[str] = frozenset()
        self._listener: Listener | None = None

    def listen(self, listener: Listener) -> None:
        """Tells the names now, and whenever they change."""
        with self._lock:
            self._listener = listener
            latest = self._latest
        listener(latest)

    def changed(self, names: frozenset[str]) -> None:
        """There are these now."""
        with self._lock:
            self._latest = names
            listener = self._listener
        if listener is not None:
            listener(names)

    def forget(self) -> None:
        """Tells nobody any more."""
        with self._lock:
            self._latest, self._listener = frozenset(), None


DIRECTORY = ReplicaDirectory()
