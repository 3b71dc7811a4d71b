"""What the pacer says of when steps end, and what it counts."""

from typing import Any

import numpy as np
import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.engine.batching.pacing import Pace, Pacer
from nitsum_jax.engine.kv.kv_pool import BlockAllocator
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.dispatched import Chunk, Step
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.profiles.library import load_profile
from tests.runtime.fake_cell import FakeInstance

COST = CostModel(load_profile("qwen2.5-32b-h200"))
SCALE = 3.0


@pytest.fixture
def instance() -> FakeInstance:
    """A TP-2 instance in which four sequences of 1000 tokens decode and a prompt of 700 waits."""
    spec = parse_layout("tp2", 8).instances[0]
    instance = FakeInstance(spec, [BlockAllocator(4000) for _ in range(8)], 8, 256)
    for number in range(5):
        prompt = 1000 if number < 4 else 700
        page_table = np.zeros((8, 256), np.int32)
        sequence = LiveRequest(Request(str(number), (1,) * prompt, 50), 0, [1] * prompt, page_table, 1050)
        assert instance.grow(sequence, prompt)
        instance.join(sequence)
        if number < 4:
            sequence.cached = 1000
            instance.prefills.remove(sequence)
    return instance


def pacer() -> Pacer:
    return Pacer(Pace(COST, "test", 1000, SCALE))


def chunk(instance: FakeInstance, new: int, before: int, *, joined: bool = False) -> Step:
    (sequence,) = instance.prefills
    return Step(StepShape(1, 512), [sequence], [False], chunk=Chunk(new, before), joined=joined)


def decode(instance: FakeInstance) -> Step:
    sequences = instance.decodable()
    return Step(StepShape(8, 1), sequences, [True] * len(sequences), context=sum(s.cached for s in sequences))


def test_a_chunk_and_the_decode_step_beside_it_take_as_long_as_the_fused_step(instance: FakeInstance) -> None:
    paced = pacer()
    first, second, third = chunk(instance, 512, 0), chunk(instance, 100, 512, joined=True), decode(instance)
    assert third.context == 4000
    for step in (first, second, third):
        paced.launched(instance, step, 10.0)
    # Two pieces of one prompt are one chunk to the target.
    assert third.paced_s - 10.0 == pytest.approx(SCALE * COST.step_s(2, 4, 4000, [(612, 0)]))
    assert first.start_s == 10.0
    assert second.start_s == first.paced_s
    assert third.start_s == second.paced_s
    again = decode(instance)
    paced.launched(instance, again, 99.0)  # later than the device is free
    assert again.paced_s - 99.0 == pytest.approx(SCALE * COST.step_s(2, 4, 4000))


def test_results_are_held_until_they_are_due_and_late_ones_counted(instance: FakeInstance) -> None:
    paced = pacer()
    step, late = decode(instance), decode(instance)
    for each in (step, late):
        each.tokens = np.zeros(8, np.int32)
        paced.launched(instance, each, 0.0)
    assert paced.hold(instance, step, step.paced_s - 0.001)
    assert paced.next_s() == step.paced_s
    assert paced.due(step.paced_s - 0.0005) == []
    assert paced.due(step.paced_s) == [(instance, step)]
    assert paced.next_s() is None
    assert not paced.hold(instance, late, late.paced_s + 1)
    paced.delivered(step, step.paced_s + 0.0001)
    assert paced.stats().valid
    paced.delivered(late, late.paced_s + 1)
    stats = paced.stats()
    assert (stats.steps, stats.late, stats.late_share) == (2, 1, 0.5)
    assert stats.worst_s == pytest.approx(1.0)
    assert not stats.valid


def test_hand_overs_and_switches_take_what_the_target_takes(instance: FakeInstance) -> None:
    paced = pacer()
    there = paced.transferred(1000, 2, 1, 5.0)
    assert there - 5.0 == pytest.approx(SCALE * COST.transfer_s(1000, 2, 1))
    assert paced.next_s() == there
    step = decode(instance)
    paced.launched(instance, step, 6.0)
    stall = paced.switched(instance.order, 500, 6.0)  # behind the step under way
    assert stall == pytest.approx(SCALE * COST.switch_s(500 * 1000))
    after = decode(instance)
    paced.launched(instance, after, 6.0)
    assert after.start_s == pytest.approx(step.paced_s + stall)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan")])
def test_a_scale_must_be_above_0(scale: Any) -> None:
    with pytest.raises(InvalidInputError, match="time_scale"):
        Pace(COST, "test", 1, scale)


def test_a_step_begins_when_its_devices_became_free_unless_somebody_could_have_launched_it_before(
    instance: FakeInstance,
) -> None:
    paced = pacer()
    first, second, third = decode(instance), decode(instance), decode(instance)
    paced.due(0.0)
    paced.launched(instance, first, 0.0)
    paced.due(first.paced_s - 0.01)
    paced.due(first.paced_s + 0.004)  # the machine is a little late
    paced.launched(instance, second, first.paced_s + 0.005)
    assert second.start_s == first.paced_s
    paced.due(second.paced_s + 0.004)
    paced.due(second.paced_s + 0.010)  # there was nothing to do
    paced.launched(instance, third, second.paced_s + 0.011)
    assert third.start_s == second.paced_s + 0.011
