"""Which waiting request is next: earliest deadline first, with demotion and aging.

Pure policy: time comes in as an argument, and the same calls always give the same answers.
"""

import bisect
import dataclasses

from nitsum_jax.control.tiers import Tier
from nitsum_jax.errors import OverloadedError


@dataclasses.dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue.

    Attributes:
      id: unique in the queue.
      tier: its targets.
      arrival_s: when it arrived, on the caller's clock.
      prompt_tokens: length of its prompt.
      latest_start_s: begun later than this, it misses its time-to-first-token target.
    """

    id: str
    tier: Tier
    arrival_s: float
    prompt_tokens: int
    latest_start_s: float


class WaitingQueue:
    """A bounded queue ordered by slack, the time left until a request must begin to meet its TTFT target.

    A request *can still make it* until its latest start (arrival + TTFT target - predicted prefill time); after that it
    is *late*.  The next request is

    1. of those that can still make it, the one with the least slack (then the earlier arrival, then the earlier push);
    2. if there is none, the late one that arrived first.

    So a late request never delays one that can still make it, with one exception, the aging rule: late requests that
    have waited `patience_s` since they arrived get every `aging_every`-th pop, first come first served, as otherwise an
    overload that never ends would starve them.

    Hence nothing waits for ever, whatever arrives after it (arrival times must not run backwards).  A request goes
    before its latest start, or is late from then on; patience_s after its arrival it is owed a share of the pops, and
    only requests that arrived before it, fewer than `capacity`, are owed theirs first.  So it is out after at most
    `capacity * aging_every` more pops.

    Not thread-safe.  Queues of a few thousand are meant: pushes and pops are binary searches in sorted lists.
    """

    def __init__(
        self, capacity: int, *, patience_s: float = 30.0, aging_every: int = 8, prefill_s_per_token: float = 0.0
    ) -> None:
        """Makes an empty queue.

        Args:
          capacity: most requests that may wait, at least 1.
          patience_s: wait after which a late request is served by the aging rule, at least 0.
          aging_every: of so many pops one serves the aging rule, at least 1 (which puts aged requests first).
          prefill_s_per_token: predicted prefill time per prompt token, taken off the TTFT target; 0 leaves it out.

        Raises:
          ValueError: an argument is out of its range.
        """
        if capacity < 1 or aging_every < 1 or not patience_s >= 0 or not prefill_s_per_token >= 0:
            raise ValueError(
                f"WaitingQueue({capacity=}, {patience_s=}, {aging_every=}, {prefill_s_per_token=}): capacity and"
                " aging_every must be at least 1, the times at least 0"
            )
        self._capacity = capacity
        self._patience_s = patience_s
        self._aging_every = aging_every
        self._prefill_s_per_token = prefill_s_per_token
        self._entries: dict[str, tuple[int, Waiting]] = {}  # id -> (push number, entry)
        # Sorted lists; the push number is unique, so that entries themselves are never compared.
        self._in_time: list[tuple[float, float, int, Waiting]] = []  # (latest start, arrival, push number, entry)
        self._late: list[tuple[float, int, Waiting]] = []  # (arrival, push number, entry)
        self._pushed = 0
        self._passed_over = 0  # pops in a row that passed over an aged request
        self._prompt_tokens = 0

    @property
    def capacity(self) -> int:
        """Most requests that may wait."""
        return self._capacity

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all waiting requests together."""
        return self._prompt_tokens

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def push(self, request_id: str, tier: Tier, arrival_s: float, prompt_tokens: int) -> None:
        """Adds a request.

        Raises:
          OverloadedError: the queue is full.
          ValueError: the id is in the queue already.
        """
        if request_id in self._entries:
            raise ValueError(f"request {request_id!r} is in the queue already")
        if len(self._entries) >= self._capacity:
            raise OverloadedError(
                f"the queue is full ({self._capacity} requests are waiting): try again later, or raise --max_queue"
            )
        latest = arrival_s + tier.ttft_ms / 1000 - prompt_tokens * self._prefill_s_per_token
        entry = Waiting(request_id, tier, arrival_s, prompt_tokens, latest)
        bisect.insort(self._in_time, (latest, arrival_s, self._pushed, entry))
        self._entries[request_id] = (self._pushed, entry)
        self._pushed += 1
        self._prompt_tokens += prompt_tokens

    def peek(self, now_s: float) -> Waiting | None:
        """The request that pop_next would return at this time; None if the queue is empty."""
        self._demote(now_s)
        if self._in_time and not (self._aged(now_s) and self._passed_over + 1 >= self._aging_every):
            return self._in_time[0][-1]
        return self._late[0][-1] if self._late else None

    def pop_next(self, now_s: float) -> Waiting | None:
        """Takes the next request out; None if the queue is empty.

        Args:
          now_s: the time, on the clock of the arrivals.  It must not run backwards: late stays late.
        """
        entry = self.peek(now_s)
        if entry is None:
            return None
        in_time = bool(self._in_time) and self._in_time[0][-1] is entry
        self._passed_over = self._passed_over + 1 if in_time and self._aged(now_s) else 0
        self.remove(entry.id)
        return entry

    def remove(self, request_id: str) -> bool:
        """Takes a request out, wherever it stands; returns whether it was there."""
        found = self._entries.pop(request_id, None)
        if found is None:
            return False
        number, entry = found
        key = (entry.latest_start_s, entry.arrival_s, number)
        at = bisect.bisect_left(self._in_time, key, key=lambda item: item[:3])
        if at < len(self._in_time) and self._in_time[at][-1] is entry:
            del self._in_time[at]
        else:
            del self._late[bisect.bisect_left(self._late, key[1:], key=lambda item: item[:2])]
        self._prompt_tokens -= entry.prompt_tokens
        return True

    def _demote(self, now_s: float) -> None:
        """Moves requests that are late by now to the late list."""
        count = bisect.bisect_left(self._in_time, now_s, key=lambda item: item[0])
        for _, arrival, number, entry in self._in_time[:count]:
            bisect.insort(self._late, (arrival, number, entry))
        del self._in_time[:count]

    def _aged(self, now_s: float) -> bool:
        return bool(self._late) and now_s - self._late[0][0] >= self._patience_s
