"""The plainest policy: first come, first served; prefill and decode steps are one, or take turns."""

import bisect
import collections
from collections.abc import Callable, Iterable, Sequence

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, SeatTest, takes_prompts
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.switching.migration import Destination, Leaving, SeatsLeft, fewest_bytes
from nitsum_jax.errors import OverloadedError


class FifoPolicy(Policy):
    """First come, first served; a request that lost its blocks goes first.  See `policy.Policy` for the calls."""

    # ruff: noqa: D102
    def __init__(self, capacity: int):
        self.capacity = capacity
        self._new: collections.deque[LiveRequest] = collections.deque()
        self._returned: list[LiveRequest] = []  # by the order of their admission
        self._prefilled: set[Instance] = set()  # whose last step was a prefill

    def __len__(self) -> int:
        return len(self._new)

    def push(self, sequence: LiveRequest) -> None:
        if len(self._new) >= self.capacity:
            raise OverloadedError(f"{self.capacity} requests wait already: try again later")
        self._new.append(sequence)

    def arrivals(self, now_s: float) -> Sequence[LiveRequest]:
        del now_s
        return ()  # all were checked when they came, and again when the layout changes

    def waiting(self) -> Iterable[LiveRequest]:
        return [*self._returned, *list(self._new)]

    def next(self, instances: Sequence[Instance], test: SeatTest, now_s: float) -> tuple[LiveRequest, Instance] | None:
        del now_s
        if not self._returned and not self._new:
            return None
        sequence = self._returned[0] if self._returned else self._new[0]
        fitting = [i for i in instances if takes_prompts(i) and test.fits(sequence, i)]
        if not fitting:
            return None
        if self._returned:
            del self._returned[0]
        else:
            self._new.popleft()
        load = {i: len(i.rows) / i.spec.tp for i in fitting}
        least = min(load.values())

        def rank(i: Instance) -> tuple[bool, int, float, int]:
            # Pages that lie there already are worth a little more load.
            return load[i] >= least + 2, -test.held(sequence, i), load[i], -i.free_pages()

        return sequence, min(fitting, key=rank)

    def again(self, sequence: LiveRequest) -> None:
        bisect.insort(self._returned, sequence, key=lambda s: s.admitted)

    def remove(self, sequence: LiveRequest) -> None:
        for queue in (self._returned, self._new):
            if sequence in queue:
                queue.remove(sequence)

    def prefill(self, instance: Instance) -> PrefillChoice | None:
        if not instance.prefills or (instance in self._prefilled and instance.owes_decode()):
            return None
        return PrefillChoice(instance.prefills[0], fused=True)

    def decode_at(self, sequence: LiveRequest, instances: Sequence[Instance], now_s: float) -> Instance | None:
        del sequence, now_s
        return min(instances, key=_load, default=None)

    def place(
        self, sequences: Sequence[Leaving], hosts: Sequence[Destination], room: Callable[[], SeatsLeft]
    ) -> list[int | None]:
        return fewest_bytes(sequences, hosts, room)

    def victim(self, instance: Instance) -> LiveRequest:
        return max(instance.rows.values(), key=lambda s: s.admitted)

    def launched(self, instance: Instance, step: Step, now_s: float) -> None:
        del now_s
        (self._prefilled.discard if step.decoding else self._prefilled.add)(instance)

    def relaid(self, instances: Sequence[Instance], now_s: float) -> None:
        del now_s
        self._prefilled.intersection_update(instances)


def _load(instance: Instance) -> tuple[float, int]:
    return len(instance.rows) / instance.spec.tp, -instance.free_pages()
