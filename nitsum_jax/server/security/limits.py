"""How often, and how many at once: a token bucket and a count per client."""

import contextlib
import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.security.errors import RateLimitedError

_CONCURRENT_RETRY_S = 1.0  # when one of its calls will end is unknown
_MOST_CLIENTS = 10_000


@dataclasses.dataclass(slots=True)
class _Bucket:
    """Allowance of one client, as of a time."""

    left: float
    time_s: float


class OutputSlot:
    """What a client holds while its call is answered: one output, and more if the call asks for more."""

    def __init__(self, open_: Counter[str], client: str, concurrent: int | None) -> None:
        """Takes one."""
        self._open = open_
        self._client = client
        self._concurrent = concurrent
        self._held = 0
        self._take(1)

    def more(self, outputs: int) -> None:
        """Holds so many outputs more.

        Raises:
          InvalidInputError: the call alone has more than the client may have.
          RateLimitedError: with its other calls it has.
        """
        most = self._concurrent
        if most is not None and self._held + outputs > most:
            raise InvalidInputError(
                f"{self._held + outputs} outputs are more than {self._client} may have at once: ask for at most {most}"
            )
        self._take(outputs)

    def leave(self) -> None:
        """Gives all of it back."""
        self._open[self._client] -= self._held
        if not self._open[self._client]:
            del self._open[self._client]

    def _take(self, outputs: int) -> None:
        held = self._open[self._client]
        if self._concurrent is not None and held + outputs > self._concurrent:
            raise RateLimitedError(
                f"{self._client} has {held} open at once and may have {self._concurrent}: wait for one to end",
                _CONCURRENT_RETRY_S,
            )
        self._open[self._client] += outputs
        self._held += outputs


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
    def use(self, client: str, per_minute: int | None, concurrent: int | None) -> Iterator[OutputSlot]:
        """Holds one of the client's places for the body.

        A client may use a minute's worth of calls at once, and gets the allowance back evenly.

        Args:
          client: its name.
          per_minute: calls; None: no limit.
          concurrent: outputs at the same time; None: no limit.

        Yields:
          Its place, which grows with a call for several outputs.

        Raises:
          RateLimitedError: a limit is reached; it says when to try again.
        """
        place = OutputSlot(self._open, client, concurrent)
        try:
            if per_minute is not None:
                self._spend(client, per_minute)
            yield place
        finally:
            place.leave()

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
