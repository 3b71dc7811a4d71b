"""Whom to give up while more comes than can be served: a few early and well chosen, instead of all by a little.

In an overload that lasts longer than a deadline, least slack first makes everybody wait as long as they may, and then
a small error of prediction makes all of them late, one after the other.  Who will be late can be seen much earlier,
by the work that stands before them and how fast it goes; and it need not be them: of those that stand before a
request that would be late, the one with the most work is given up (Moore, "An n job, one machine sequencing algorithm
for minimizing the number of late jobs", 1968: no choice has fewer late ones, were the speed known).

Pure: times come in, decisions go out.
"""

import collections
import heapq
from collections.abc import Sequence


class Drain:
    """How fast the requests of one tier leave the backlog while some wait: seconds of work per second."""

    def __init__(self, window_s: float):
        """Remembers what left for so long."""
        self.window_s = window_s
        self._since: float | None = None  # some have been waiting since then
        self._taken: collections.deque[tuple[float, float]] = collections.deque()
        self._sum_s = 0.0

    def begins(self, now_s: float) -> None:
        """Somebody waits now."""
        if self._since is None:
            self._since = now_s

    def ends(self) -> None:
        """Nobody waits any more: what comes next may go faster."""
        self._since = None
        self._taken.clear()
        self._sum_s = 0.0

    def took(self, now_s: float, work_s: float) -> None:
        """A request left for an instance."""
        if self._since is not None:
            self._taken.append((now_s, work_s))
            self._sum_s += work_s

    def rate(self, now_s: float) -> float | None:
        """Seconds of work per second; None while it has been watched for too short a time."""
        if self._since is None or now_s - self._since < self.window_s:
            return None
        while self._taken and self._taken[0][0] < now_s - self.window_s:
            self._sum_s -= self._taken.popleft()[1]
        return max(0.0, self._sum_s) / self.window_s


def overflow(slacks: Sequence[float], work_s: Sequence[float], rate: float) -> list[int]:
    """Whom to give up so that the others begin in time: as few as can be in this order (Moore 1968, Hodgson).

    Args:
      slacks: seconds from now by which each must have begun, in the order in which they go; no other order does better
        where it is that of the deadlines.
      work_s: seconds of work of each.
      rate: seconds of work that are done per second, more than 0.

    Returns:
      Their places, in no special order.
    """
    ahead = 0.0
    kept: list[tuple[float, int]] = []
    given_up = []
    for place, (slack_s, work) in enumerate(zip(slacks, work_s, strict=True)):
        heapq.heappush(kept, (-work, place))
        if ahead <= slack_s * rate:
            ahead += work
            continue
        ahead += work
        most, worst = heapq.heappop(kept)
        ahead += most
        given_up.append(worst)
    return given_up
