"""Requests that no instance has taken: per tier in the order of their deadlines, and the late ones apart."""

import bisect
import heapq
import itertools
from collections.abc import Iterator
from typing import Generic, TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.scheduling.shedding import overflow

J = TypeVar("J", bound=Job)
_Key = tuple[float, float, int, J]
_LateKey = tuple[float, int, J]


class Backlog(Generic[J]):
    """A queue per tier, earliest deadline first, and one of late requests, first come first served.

    Pushes are numbered, so that equal times keep their order and two runs of the same calls agree.
    """

    def __init__(self, *, by_arrival: bool = False) -> None:
        """Makes an empty one; `by_arrival` orders by arrival instead and calls nobody late."""
        self._by_arrival = by_arrival
        self._in_time: dict[str, list[_Key[J]]] = {}
        self._late: list[_LateKey[J]] = []
        self._keys: dict[str, _Key[J]] = {}
        self._late_keys: dict[str, _LateKey[J]] = {}
        self._starts: list[tuple[float, int, J]] = []  # a heap of latest starts; of some that have gone, too
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._keys) + len(self._late)

    @property
    def in_time(self) -> int:
        """Waiting requests that can still meet their targets."""
        return len(self._keys)

    def jobs(self) -> Iterator[J]:
        """All that wait, in no special order."""
        for queue in self._in_time.values():
            for key in queue:
                yield key[3]
        for _, _, job in self._late:
            yield job

    def push(self, job: J) -> None:
        """Adds a request; its `due_s`, `latest_start_s` and `late` must be set."""
        if job.late and not self._by_arrival:
            self._push_late(job)
            return
        number = next(self._numbers)
        key = (job.arrival_s, 0.0, number, job) if self._by_arrival else (job.due_s, -job.latest_start_s, number, job)
        if not self._by_arrival:
            heapq.heappush(self._starts, (job.latest_start_s, number, job))
        bisect.insort(self._in_time.setdefault(job.tier.name, []), key)
        self._keys[job.id] = key

    def remove(self, job: J) -> bool:
        """Takes a request out; returns whether it was there."""
        key = self._keys.pop(job.id, None)
        if key is not None:
            queue = self._in_time[job.tier.name]
            del queue[bisect.bisect_left(queue, key)]
            return True
        late_key = self._late_keys.pop(job.id, None)
        if late_key is not None:
            del self._late[bisect.bisect_left(self._late, late_key)]
            return True
        return False

    def demote(self, now_s: float) -> list[J]:
        """Calls those late that had to begin before now; returns them."""
        if self._by_arrival:
            return []
        demoted = []
        while self._starts and self._starts[0][0] < now_s:
            _, number, job = heapq.heappop(self._starts)
            key = self._keys.get(job.id)
            if key is not None and key[2] == number:
                self.give_up(job)
                demoted.append(job)
        return demoted

    def shed(self, tier: str, now_s: float, rate: float) -> list[J]:
        """Calls as few of a tier late as must be for the others to begin in time; returns them.

        Args:
          tier: name.
          now_s: the time.
          rate: seconds of work (`Job.work_s`) that leave the backlog per second.
        """
        queue = self._in_time.get(tier, [])
        shed = []
        slacks, work = [key[3].latest_start_s - now_s for key in queue], [key[3].work_s for key in queue]
        for job in [queue[place][3] for place in overflow(slacks, work, rate)]:
            self.give_up(job)
            shed.append(job)
        return shed

    def heads(self, depth: int) -> Iterator[J]:
        """The first `depth` requests of every tier that are in time; tiers in the order of their first one."""
        queues = [queue for queue in self._in_time.values() if queue]
        for queue in sorted(queues, key=lambda queue: queue[0][:3]) if len(queues) > 1 else queues:
            for key in queue[:depth]:
                yield key[3]

    def waiting(self, tier: str) -> int:
        """Requests of this tier that are in time."""
        return len(self._in_time.get(tier, ()))

    def due_by(self, tier: str, time_s: float) -> int:
        """Requests of this tier that are in time and due before then."""
        return bisect.bisect_left(self._in_time.get(tier, []), (time_s,))

    def before(self, due_s: float, latest_start_s: float) -> Iterator[J]:
        """Those in time that go before one with these times."""
        for queue in self._in_time.values():
            for key in queue[: bisect.bisect_left(queue, (due_s, -latest_start_s))]:
                yield key[3]

    def give_up(self, job: J) -> None:
        """Calls one that waits in time late; nobody is by arrival."""
        if not self._by_arrival and self.remove(job):
            job.give_up()
            self._push_late(job)

    def late(self) -> Iterator[J]:
        """The late requests, first come first; nothing may be added or removed meanwhile."""
        for _, _, job in self._late:
            yield job

    def _push_late(self, job: J) -> None:
        key = self._late_keys[job.id] = (job.arrival_s, next(self._numbers), job)
        bisect.insort(self._late, key)
