"""What a policy must answer, and what it may listen to."""

import collections
from collections.abc import Callable, Iterable, Sequence

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.engine.batching.waiting import FifoPolicy
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import Home, LiveRequest
from nitsum_jax.engine.policy import Policy, SeatTest
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.switching.migration import Destination, Leaving, SeatsLeft, fewest_bytes
from tests.control.profiles import roofline_profile
from tests.runtime.fake_cell import FakeCell

COST = CostModel(roofline_profile())


class LastFirst(Policy):
    """Whoever came last goes first; it answers what must be answered, and listens to nothing."""

    def __init__(self) -> None:
        self.capacity = 100
        self._stack: list[LiveRequest] = []

    def __len__(self) -> int:
        return len(self._stack)

    def push(self, sequence: LiveRequest) -> None:
        self._stack.append(sequence)

    def arrivals(self, now_s: float) -> Sequence[LiveRequest]:
        return ()

    def waiting(self) -> Iterable[LiveRequest]:
        return list(self._stack)

    def next(self, instances: Sequence[Instance], test: SeatTest, now_s: float) -> tuple[LiveRequest, Instance] | None:
        if not self._stack or not test.fits(self._stack[-1], instances[0]):
            return None
        return self._stack.pop(), instances[0]

    def again(self, sequence: LiveRequest) -> None:
        self._stack.append(sequence)

    def remove(self, sequence: LiveRequest) -> None:
        self._stack.remove(sequence)

    def prefill(self, instance: Instance) -> PrefillChoice | None:
        return PrefillChoice(instance.prefills[0])

    def decode_at(self, sequence: LiveRequest, instances: Sequence[Instance], now_s: float) -> Instance | None:
        return instances[0]

    def place(
        self, sequences: Sequence[Leaving], hosts: Sequence[Destination], room: Callable[[], SeatsLeft]
    ) -> list[int | None]:
        return fewest_bytes(sequences, hosts, room)

    def victim(self, instance: Instance) -> LiveRequest:
        return next(iter(instance.rows.values()))


class NotingFifo(FifoPolicy):
    """Writes down what it is told."""

    def __init__(self) -> None:
        super().__init__(100)
        self.told: list[str] = []

    def seated(self, sequence: LiveRequest, instance: Instance, now_s: float) -> None:
        self.told.append("seated")

    def left(self, sequence: LiveRequest, home: Home) -> None:
        self.told.append("left")

    def launched(self, instance: Instance, step: Step, now_s: float) -> None:
        super().launched(instance, step, now_s)
        self.told.append("launched")

    def settled(self, instance: Instance, step: Step, now_s: float) -> None:
        self.told.append("settled")

    def first_token(self, sequence: LiveRequest, now_s: float) -> None:
        self.told.append("first token")

    def ended(self, sequence: LiveRequest, now_s: float) -> None:
        self.told.append("ended")


def served(policy: Policy, *requests: tuple[int, int]) -> FakeCell:
    cell = FakeCell(lambda clock: policy, COST, "tp8", 4000)
    for prompt, output in requests:
        cell.add(0.0, prompt, output, "chat")
    cell.run()
    return cell


def test_a_policy_that_listens_to_nothing_serves_all_the_same() -> None:
    cell = served(LastFirst(), (300, 5), (40, 1), (700, 20))
    assert len(cell.ends) == 3
    assert not cell.alive


def test_the_life_of_a_request_is_told_in_its_order() -> None:
    policy = NotingFifo()
    served(policy, (300, 2))
    order = [name for name in policy.told if name not in ("launched", "settled")]
    assert order == ["seated", "first token", "left", "ended"]
    steps = collections.Counter(policy.told)
    assert steps["launched"] == steps["settled"] == 2  # the prompt with its token, and another token


def test_a_policy_must_answer_everything() -> None:
    class Half(LastFirst):
        victim = Policy.victim  # not an answer

    with pytest.raises(TypeError, match="victim"):
        Half()
