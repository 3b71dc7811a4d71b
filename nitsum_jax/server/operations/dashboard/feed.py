"""One look at the cell per second, shared by all who watch, and the last minutes for those who come late."""

import asyncio
import json
import logging
from collections import deque
from collections.abc import AsyncGenerator

from nitsum_jax.errors import OverloadedError
from nitsum_jax.server.operations.dashboard.snapshot import StatusSource, point

_LOG = logging.getLogger(__name__)

INTERVAL_S = 1.0
KEPT = 600
"""Points of the curves: ten minutes."""
MAX_VIEWERS = 64


class Feed:
    """Takes snapshots for as long as it runs, and hands the newest one to every viewer.

    A viewer that reads slowly misses snapshots instead of piling them up.
    """

    def __init__(self, source: StatusSource, interval_s: float = INTERVAL_S) -> None:
        """Takes no snapshot yet.

        Args:
          source: what is looked at.
          interval_s: seconds between two looks.
        """
        self._source = source
        self._interval_s = interval_s
        self._points: deque[dict[str, object]] = deque(maxlen=KEPT)
        self._latest = ""
        self._version = 0
        self._news = asyncio.Condition()
        self._closed = False
        self._viewers = 0

    @property
    def viewers(self) -> int:
        """How many watch now."""
        return self._viewers

    async def run(self) -> None:
        """Looks until it is cancelled or closed."""
        while not self._closed:
            await self.look()
            await asyncio.sleep(self._interval_s)

    async def look(self) -> None:
        """Takes a snapshot now."""
        try:
            snapshot = self._source.snapshot()
        except Exception:  # whatever goes wrong here must not end the curves for good
            _LOG.exception("the dashboard's look at the cell failed")
            return
        self._points.append(point(snapshot))
        async with self._news:
            self._latest = snapshot.as_json()
            self._version += 1
            self._news.notify_all()

    async def close(self) -> None:
        """Ends the streams of all viewers, so that the server can stop."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events: `history`, a list of points, and then `snapshot` for every look.

        Raises:
          OverloadedError: too many watch already.
        """
        if self._viewers >= MAX_VIEWERS:
            raise OverloadedError(f"{MAX_VIEWERS} browsers watch the dashboard already: close one")
        self._viewers += 1
        try:
            yield f"retry: 2000\nevent: history\ndata: {json.dumps(list(self._points), separators=(',', ':'))}\n\n"
            seen = 0
            while True:
                async with self._news:
                    while not self._closed and self._version == seen:
                        await self._news.wait()
                    if self._closed:
                        return
                    seen, latest = self._version, self._latest
                yield f"event: snapshot\ndata: {latest}\n\n"
        finally:
            self._viewers -= 1
