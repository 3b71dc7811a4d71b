"""A prompt's chunk and the sequences that decode share a step: the same tokens, and all else goes on as before."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.engine.batching.step_log import StepTiming
from nitsum_jax.engine.batching.waiting import FifoPolicy
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.models.loading import OpenModel
from tests.control.profiles import roofline_profile
from tests.engine.harness import Answer, Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts
from tests.engine.switching.likelihood import likelihoods
from tests.runtime.fake_cell import FakeCell

# The bits of mixed steps, as users compile them, are asked in tests/engine/step/test_mixed.py.
pytestmark = pytest.mark.usefixtures("quick_compiles")

VOCAB = 93
SIZES = (130, 33, 5, 70, 48, 64, 9, 20, 31, 90)
PROMPTS = [list(random_prompts(1, (size, size), VOCAB, size)[0]) for size in SIZES]
PROMPTS[5][:48] = PROMPTS[3][:48]  # begins like another
LAYOUTS = ("tp1x4", "tp2x2", "tp2:prefill+tp1x2:decode")


def serve(harness: Harness) -> list[Answer]:
    """All requests: some come while others decode, and the layout changes in between."""

    def submit(*indices: int) -> None:
        for index in indices:
            sampling: dict[str, Any] = {} if index % 3 else {"temperature": 1.1, "top_p": 0.9, "seed": index}
            harness.submit(PROMPTS[index], 100, name=str(index), **sampling)

    with harness.paused():
        submit(0, 1, 2, 3)
        harness.recorder.when("1", 5, lambda: submit(4, 5))
        switches = [harness.switch_when("1", 20, LAYOUTS[1])]
        harness.recorder.when("1", 40, lambda: submit(6, 7))
        switches.append(harness.switch_when("1", 50, LAYOUTS[2]))
        harness.recorder.when("1", 70, lambda: submit(8, 9))
        switches.append(harness.switch_when("1", 90, LAYOUTS[0]))
    answers = harness.collect(map(str, range(len(PROMPTS))))
    assert [switch.result(60).to_layout for switch in switches] == [*LAYOUTS[1:], LAYOUTS[0]]
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()
    return answers


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model("llama_odd", tmp_path_factory.mktemp("model"))


def engine(model: OpenModel, fused_steps: str) -> Harness:
    return Harness(model, layouts=LAYOUTS, fused_steps=fused_steps)


@pytest.fixture(scope="module")
def fused(model: OpenModel) -> Iterator[Harness]:
    with engine(model, "on") as harness:
        harness.engine.wait_for_layouts()
        yield harness


def timings_of(harness: Harness) -> list[StepTiming]:
    """The steps from now on."""
    found: list[StepTiming] = []

    def note(timings: Sequence[StepTiming]) -> None:
        found.extend(timings)

    harness.engine.on_step(note)
    return found


def mixed(timings: Sequence[StepTiming]) -> list[StepTiming]:
    return [timing for timing in timings if timing.decode_sequences and timing.prefill_tokens]


def test_tokens_are_those_of_separate_steps(model: OpenModel, fused: Harness) -> None:
    timings = timings_of(fused)
    answers = serve(fused)
    assert {timing.tp for timing in mixed(timings)} >= {1, 2}
    assert fused.engine.stats().hand_overs > 0
    assert fused.engine.stats().prefix_hit_tokens > 0
    with engine(model, "off") as apart:
        timings = timings_of(apart)
        expected = serve(apart)
        assert mixed(timings) == []
    assert [(a.tokens, a.finish) for a in answers] == [(e.tokens, e.finish) for e in expected]


def test_streams_get_their_tokens_while_a_long_prompt_comes(fused: Harness) -> None:
    fused.switch("tp2x2")
    timings = timings_of(fused)
    with fused.paused():
        streams = [fused.submit(prompt, 60) for prompt in PROMPTS[1:5]]
        fused.recorder.when(streams[0], 20, lambda: fused.submit(PROMPTS[9][::-1], 5, name="long"))
    fused.collect([*streams, "long"])
    assert [timing.prefill_tokens for timing in mixed(timings)[-3:]] == [(32,), (32,), (26,)]
    assert all(timing.decode_sequences >= 2 for timing in mixed(timings)[-3:])
    fused.switch("tp1x4")


def test_the_likelihood_of_a_text_is_the_same_after_switches_up_to_rounding(fused: Harness) -> None:
    before = likelihoods(fused)
    after = likelihoods(fused, ("tp2x2", "tp1x4", "tp2:prefill+tp1x2:decode", "tp1x4"))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
    broken = likelihoods(fused, ("tp2x2", "tp1x4"), corrupt_at=40)
    assert np.abs(broken - before).max() > 1e-3


def test_a_prompt_may_be_cancelled_and_a_device_lost(fused: Harness) -> None:
    with fused.paused():
        streams = [fused.submit(prompt, 40) for prompt in PROMPTS[1:6]]
        cancelled = fused.submit(PROMPTS[9], 40)
        fused.recorder.when(streams[0], 3, lambda: fused.engine.cancel(cancelled))
        fused.recorder.when(streams[1], 8, lambda: fused.engine.lose_device(3))
    answers = fused.collect([*streams, cancelled])
    assert [answer.finish for answer in answers] == [FinishReason.LENGTH] * 5 + [FinishReason.CANCELLED]
    fused.engine.restore_device(3)
    eventually(lambda: str(fused.engine.layout()) == "tp1x4")
    again = fused.run(PROMPTS[1:6], 40)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in answers[:5]]


def test_when_blocks_run_out_whoever_goes_is_in_no_step() -> None:
    """A virtual cell with few blocks: making room for those that decode may send back the very one with the chunk."""
    cost = CostModel(roofline_profile(mixed_steps=True))
    cell = FakeCell(lambda clock: FifoPolicy(100), cost, "tp8", 40)
    for number in range(12):
        cell.add(0.01 * number, 100 + 20 * (number % 4), 150, "tight")
    cell.run()
    assert len(cell.ends) == 12
    assert cell.counters.sent_back > 3
    (instance,) = cell.instances
    assert instance.free_pages() == instance.total_pages()


def test_of_a_sequence_beside_a_chunk_all_but_its_own_new_tokens_are_settled() -> None:
    """What is settled is copied before a switch, while steps go on."""
    cell = FakeCell(lambda clock: FifoPolicy(100), CostModel(roofline_profile(mixed_steps=True)), "tp8", 4000)
    flying: list[int] = []
    policy: Any = cell.policy
    launched = policy.launched

    def note(instance: Instance, step: Step, now_s: float) -> None:
        if step.chunk is not None:
            beside = (sequence for sequence in step.sequences[1:] if not sequence.landing)
            flying.extend(sequence.cached - instance.settled_tokens(sequence) for sequence in beside)
        launched(instance, step, now_s)

    policy.launched = note
    cell.add(0.0, 900, 60, "tight")
    cell.add(0.01, 2000, 5, "tight")
    cell.run()
    assert flying
    assert set(flying) <= {1, 2}  # two steps are in flight at most


def test_there_are_few_buckets_and_none_in_deterministic_mode() -> None:
    wide = EngineConfig(max_batch=100, prefill_chunk=512)
    assert wide.mixed_shapes() == tuple(StepShape(1, t, b) for t in (32, 512) for b in (32, 104))
    assert EngineConfig(max_batch=12, prefill_chunk=32).mixed_shapes() == (StepShape(1, 32, 16),)
    assert (wide.fuses("tpu"), wide.fuses("gpu"), wide.fuses("cpu")) == (True, True, False)
    assert EngineConfig(fused_steps="on").fuses("cpu")
    assert not EngineConfig(fused_steps="off").fuses("tpu")
    assert not EngineConfig(deterministic=True).fuses("tpu")
