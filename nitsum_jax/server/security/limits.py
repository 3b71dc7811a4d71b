"""How often, and how many at once: a token bucket and a count per client."""

import contextlib
import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from nitsum_jax.server.security.errors import RateLimitedError

_CONCURRENT_RETRY_S = 1.0  # nobody knows when one of its calls will end
_MOST_CLIENTS = 10_000


@dataclasses.dataclass(slots=True)
class _Bucket:
    """Allowance of one client, as of a time."""

    left: float
    time_s: float


class Limits:
    """Limits of clients, by name. Only the event loop touches it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begins with full buckets.

        Args:
          clock: monotonic seconds.
        """
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def use(self, client: str, per_minute: int | None, concurrent: int | None) -> Iterator[None]:
        """Holds one of the client's places for the body.

        A client may use a minute's worth of calls at once, and gets the allowance back evenly.

        Args:
          client: its name.
          per_minute: calls; None: no limit.
          concurrent: calls at the same time; None: no limit.

        Raises:
          RateLimitedError: a limit is reached; it says when to try again.
        """
        if concurrent is not None and self._open[client] >= concurrent:
            raise RateLimitedError(
                f"{client} has {self._open[client]} open at once, the most it may: wait for one to end",
                _CONCURRENT_RETRY_S,
            )
        if per_minute is not None:
            self._spend(client, per_minute)
        self._open[client] += 1
        try:
            yield
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    def _spend(self, client: str, per_minute: int) -> None:
        now = self._clock()
        bucket = self._buckets.get(client)
        if bucket is None:
            bucket = self._buckets[client] = _Bucket(per_minute, now)
            if len(self._buckets) > _MOST_CLIENTS:
                self._buckets.popitem(last=False)
        rate = per_minute / 60
        bucket.left = min(float(per_minute), bucket.left + (now - bucket.time_s) * rate)
        bucket.time_s = now
        if bucket.left < 1:
            wait_s = (1 - bucket.left) / rate
            raise RateLimitedError(
                f"{client} may make {per_minute} requests a minute: try again in {math.ceil(wait_s)} s", wait_s
            )
        bucket.left -= 1
