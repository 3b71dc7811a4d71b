"""KV blocks copied ahead of a switch: the same tokens, and only pages written since are left for the switch itself."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.switching.precopy import _Taken
from nitsum_jax.errors import PreconditionError
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts
from tests.engine.switching.test_switch_failures import failing

pytestmark = pytest.mark.usefixtures("quick_compiles")

PROMPTS = [prompt for size in (150, 90, 1, 33, 120, 60, 75, 8) for prompt in random_prompts(1, (size, size), 93, size)]
LENGTH = 100
WALK = ("tp2x2", "tp4", "tp2+tp1x2", "tp1x4", "tp4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model("llama_odd", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model: OpenModel) -> list[tuple[int, ...]]:
    with Harness(model, deterministic=True) as harness:
        return [answer.tokens for answer in harness.run(PROMPTS, LENGTH)]


@pytest.fixture(scope="module", params=[False, True], ids=["behind the steps", "by memcpy"])
def shared(model: OpenModel, request: pytest.FixtureRequest) -> Iterator[Harness]:
    with Harness(model, deterministic=True, precopy=True, drain_before_switch=request.param) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    shared.switch("tp1x4")
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


def test_a_walk_changes_no_token_and_leaves_little_to_the_switch(
    harness: Harness, undisturbed: list[tuple[int, ...]]
) -> None:
    compiles = harness.compiles()
    with harness.paused():
        names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS]
        futures = [harness.switch_when(names[0], 12 * number, layout) for number, layout in enumerate(WALK, 1)]
    assert [answer.tokens for answer in harness.collect(names)] == undisturbed
    reports = [future.result(60) for future in futures]
    block = harness.engine.cell.pool.shape.block_bytes
    for report in reports:
        assert report.kv_bytes_ahead > 0
        # A page in the making and one that was filled meanwhile, of each of four vshards.
        assert report.kv_bytes_moved - report.kv_bytes_ahead <= report.sequences * 4 * 2 * block
    assert harness.compiles() == compiles


def test_sequences_that_end_or_are_cancelled_meanwhile_free_their_copies(
    harness: Harness, undisturbed: list[tuple[int, ...]]
) -> None:
    with harness.paused():
        names = [harness.submit(prompt, LENGTH if i % 2 else 14 + i) for i, prompt in enumerate(PROMPTS)]
        future = harness.switch_when(names[0], 10, "tp4")
        harness.recorder.when(names[0], 12, lambda: harness.engine.cancel(names[1]))
    answers = harness.collect(names)
    for answer, whole in zip(answers, undisturbed, strict=True):
        assert answer.tokens == whole[: len(answer.tokens)]
    assert future.result(60).to_layout == "tp4"


def test_a_switch_that_fails_frees_what_was_copied_ahead(
    harness: Harness, undisturbed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with harness.paused():
        names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS]
        harness.recorder.when(
            names[0], 10, lambda: monkeypatch.setattr(Instance, "adopt", failing(Instance.adopt, 1, before=False))
        )
        future = harness.switch_when(names[0], 10, "tp4")
    with pytest.raises(PreconditionError, match="tp1x4 stays"):
        future.result(60)
    monkeypatch.undo()
    assert [answer.tokens for answer in harness.collect(names)] == undisturbed


class _Running:
    """An instance on device 0 with steps in flight that use blocks 3 and 5."""

    order = (0,)

    def touched(self, device: int) -> list[np.ndarray]:
        assert device == 0
        return [np.array([3], np.int32), np.array([5, 5, 3], np.int32)]


def test_copies_that_go_past_the_steps_leave_alone_what_these_may_still_write() -> None:
    pool = KvPool(jax.devices()[:2], PoolShape(8, 2, 1, 4, 1, "float32"))
    pool.allocators[0].take(2)  # blocks 0 and 1
    taken = _Taken(pool, [_Running()])  # type: ignore[list-item]  # all that is asked of an instance
    assert taken.free(0) == 4
    assert sorted(int(taken.take(0)[0]) for _ in range(4)) == [2, 4, 6, 7]
    assert (taken.free(0), pool.allocators[0].free) == (0, 2)
    assert sorted(pool.allocators[0].take(2).tolist()) == [3, 5]
    assert taken.free(1) == 8  # no step runs there
    assert taken.take(1)[0] == 0


def test_pages_are_settled_when_a_step_with_them_was_taken_in() -> None:
    home, elsewhere = object(), object()
    sequence = LiveRequest(Request("a", (1, 2, 3), 5), 0, [1, 2, 3], np.zeros((4, 2), np.int32), 8)
    sequence.home, sequence.landing = home, 3  # type: ignore[assignment]  # only its identity counts
    for instance, number, landing in ((home, 2, 3), (elsewhere, 3, 3), (home, 3, 0)):
        # Not by a step that was launched before they came, nor by one of the instance that it comes from.
        Step(StepShape(1, 1), [sequence], [True], number=number).settle(instance)  # type: ignore[arg-type]
        assert sequence.landing == landing
