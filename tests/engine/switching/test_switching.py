"""Layouts change under live streams: nothing is lost, deterministic mode keeps every token, failures stay small."""

import concurrent.futures
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from nitsum_jax.engine.batching.intake import Intake
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.engine.step.program import StepResults, StepState
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import LAYOUTS, Harness, eventually, tiny_model
from tests.engine.quick import compiling_quickly
from tests.engine.reference import generate, random_prompts

VARIANT, VOCAB = "llama_odd", 93
# Lengths of prompts from one token to several prefill chunks, and of outputs: streams begin and end between switches.
PROMPTS = [prompt for size in (1, 9, 31, 32, 33, 60, 75, 90) for prompt in random_prompts(1, (size, size), VOCAB, size)]
LENGTHS = (150, 160, 40, 100, 120, 60, 140, 80)
# Half of them sample.
SAMPLING: list[dict[str, Any]] = [{} if i % 2 else {"temperature": 1.1, "top_p": 0.9, "seed": i} for i in range(8)]
WALK = ("tp2x2", "tp4", "tp2+tp1x2", "tp1x4")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model(VARIANT, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: OpenModel) -> Iterator[Harness]:
    with Harness(model, deterministic=True) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """The engine in deterministic mode and in tp1x4; afterwards nothing may be left of a test."""
    if str(shared.engine.layout()) != "tp1x4":
        shared.switch("tp1x4")
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


def submit_all(harness: Harness) -> list[str]:
    return [
        harness.submit(prompt, length, **sampling)
        for prompt, length, sampling in zip(PROMPTS, LENGTHS, SAMPLING, strict=True)
    ]


def spoken(harness: Harness, names: list[str]) -> list[tuple[int, ...]]:
    answers = harness.collect(names)
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    assert [len(answer.tokens) for answer in answers] == list(LENGTHS)
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def without_switches(shared: Harness) -> list[tuple[int, ...]]:
    """What the eight streams say in tp1x4."""
    return spoken(shared, submit_all(shared))


@pytest.mark.parametrize("every", [4, 25])
def test_a_walk_through_the_layouts_changes_no_token(
    harness: Harness, without_switches: list[tuple[int, ...]], every: int
) -> None:
    compiles, before = harness.compiles(), harness.engine.stats()
    with harness.paused():
        names = submit_all(harness)
        futures = [harness.switch_when(names[1], number * every, layout) for number, layout in enumerate(WALK, 1)]
    assert spoken(harness, names) == without_switches
    reports = [future.result(60) for future in futures]
    assert str(harness.engine.layout()) == WALK[-1]
    assert [(report.from_layout, report.to_layout) for report in reports] == list(
        zip(("tp1x4", *WALK[:-1]), WALK, strict=True)
    )
    for report in reports:
        assert report.sequences >= 2
        assert report.kv_bytes_moved > 0
        assert report.kv_bytes_moved % harness.engine._cell.program.pool.block_bytes == 0
        assert report.weight_bytes_moved == 0
        assert report.stall_ms > 0
        assert report.requeued == 0
    after = harness.engine.stats()
    assert after.switches == before.switches + len(WALK)
    assert after.compiles == compiles  # all layouts were ready
    assert after.sent_back == before.sent_back


def test_the_layout_of_the_start_changes_no_token(harness: Harness, without_switches: list[tuple[int, ...]]) -> None:
    for layout in LAYOUTS[1:]:
        harness.switch(layout)
        assert spoken(harness, submit_all(harness)) == without_switches, layout


def test_switches_faster_than_tokens_change_none_either(
    harness: Harness, without_switches: list[tuple[int, ...]]
) -> None:
    names = submit_all(harness)
    futures = [harness.ask_for(layout) for layout in WALK * 5]
    assert [future.result(60).to_layout for future in futures] == list(WALK * 5)
    assert spoken(harness, names) == without_switches


def test_prompts_are_switched_in_the_middle_of_their_prefill(
    harness: Harness, without_switches: list[tuple[int, ...]]
) -> None:
    with harness.paused():
        names = submit_all(harness)
        future = harness.switch_when(names[0], 1, "tp4")  # the longest prompt has two chunks left at least
    assert spoken(harness, names) == without_switches
    assert future.result(60).sequences == 8


def test_an_instance_that_stays_is_not_stopped(harness: Harness) -> None:
    harness.switch("tp2x2")
    keeper = harness.engine._running.instances[0]
    with harness.paused():
        names = [harness.submit((i + 1, 2, 3), 200) for i in range(8)]
        future = harness.switch_when(names[0], 20, "tp2+tp1x2")
    assert {answer.finish for answer in harness.collect(names)} == {FinishReason.LENGTH}
    assert future.result(60).sequences == 4
    assert harness.engine._running.instances[0] is keeper


def test_the_same_layout_again_moves_nothing(harness: Harness) -> None:
    name = harness.submit((1, 2, 3), 100)
    harness.wait_for_tokens(name, 5)
    report = harness.switch("tp1x4")
    assert (report.sequences, report.kv_bytes_moved, report.stall_ms) == (0, 0, 0)
    assert len(harness.collect([name])[0].tokens) == 100


def test_growing_moves_only_what_changes_its_device(harness: Harness) -> None:
    # One sequence on one of four devices: at TP 4 a quarter of its blocks may stay.
    with harness.paused():
        name = harness.submit((1, 2, 3), 100)
        future = harness.switch_when(name, 5, "tp4")
    report = future.result(60)
    pool = harness.engine._cell.program.pool
    # Deterministic mode takes the pages of all 103 tokens at admission, but only what is written must move.
    assert report.kv_bytes_moved == report.kv_bytes_minimum == 3 * pool.block_bytes
    assert min(report.stall_ms, report.host_ms, report.transfer_ms) > 0
    harness.collect([name])


def test_an_idle_engine_switches_without_a_stall(harness: Harness) -> None:
    report = harness.switch("tp4")
    assert (report.sequences, report.kv_bytes_moved, report.stall_ms) == (0, 0, 0)


def test_a_switch_that_was_withdrawn_is_left_out(harness: Harness) -> None:
    names = [harness.submit((i + 1, 2), 60) for i in range(4)]
    futures = [harness.ask_for(layout) for layout in ("tp2x2", "tp4", "tp2x2", "tp4")]
    withdrawn = [future.cancel() for future in futures]
    for future, gone in zip(futures, withdrawn, strict=True):
        if gone:
            with pytest.raises(concurrent.futures.CancelledError):
                future.result(30)
        else:  # it had begun, and was finished
            assert future.result(30).to_layout in LAYOUTS
    assert {answer.finish for answer in harness.collect(names)} == {FinishReason.LENGTH}


# ---- failures


class Fault:
    """Makes steps of the instance on a device fail: when dispatched, or when their result is read."""

    def __init__(self, patch: pytest.MonkeyPatch, device: int, count: int, *, late: bool):
        self._left = 0
        self._count = count
        self.struck = threading.Event()
        real_start: Callable[..., None] = Instance._start

        def start(instance: Instance, shape: Any, executable: Any, *rest: Any) -> None:
            if device in instance.spec.devices and self._due():
                real_start(instance, shape, self._late if late else self._early, *rest)
                return
            real_start(instance, shape, executable, *rest)

        patch.setattr(Instance, "_start", start)

    def arm(self) -> None:
        """From now on."""
        self._left = self._count

    def _due(self) -> bool:
        self._left -= 1  # on the engine's thread alone
        if self._left >= 0:
            self.struck.set()
        return self._left >= 0

    @staticmethod
    def _early(*_: object) -> Any:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    @staticmethod
    def _late(leaves: object, state: StepState, packed: object) -> Any:
        # As after a failed step: its inputs are gone, and its results cannot be read.
        state.pool.delete()
        state.history.delete()
        unreadable: Any = _Unreadable()
        return state, StepResults(unreadable, unreadable)


class _Unreadable:
    """Tokens of a step that failed on the device."""

    def copy_to_host_async(self) -> None:
        """As an array's."""

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise RuntimeError("INTERNAL: the device is lost")


@pytest.mark.parametrize("late", [False, True], ids=["when dispatched", "when read"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_that_fails_ends_its_streams_and_no_others(
    harness: Harness, late: bool, count: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = random_prompts(12, (3, 20), VOCAB, seed=11)
    expected = [answer.tokens for answer in harness.run(prompts, 100)]
    with monkeypatch.context() as patch:
        fault = Fault(patch, device=2, count=count, late=late)
        with harness.paused():
            names = [harness.submit(prompt, 100) for prompt in prompts]
            harness.recorder.when(names[-1], 3, fault.arm)
        answers = harness.collect(names)
    failed = [answer for answer in answers if answer.finish is FinishReason.ERROR]
    assert len(failed) == 3  # those of one instance of four
    assert {answer.error for answer in failed} == {"the accelerator reported an error in this step"}
    for answer, whole in zip(answers, expected, strict=True):
        assert answer.tokens == (whole[: len(answer.tokens)] if answer in failed else whole)
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()
    assert [answer.tokens for answer in harness.run(prompts, 100)] == expected  # all instances serve again
    assert harness.switch("tp2x2").to_layout == "tp2x2"
    assert "a step on devices (2,) failed" in caplog.text


def test_a_switch_can_follow_a_failed_step_at_once(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = random_prompts(8, (3, 20), VOCAB, seed=12)
    expected = [answer.tokens for answer in harness.run(prompts, 80)]
    with monkeypatch.context() as patch:
        fault = Fault(patch, device=1, count=1, late=True)
        with harness.paused():
            names = [harness.submit(prompt, 80) for prompt in prompts]
            harness.recorder.when(names[-1], 3, fault.arm)
        assert fault.struck.wait(60)
        assert harness.switch("tp4").to_layout == "tp4"
        answers = harness.collect(names)
    for answer, whole in zip(answers, expected, strict=True):
        assert answer.tokens == (whole if answer.finish is FinishReason.LENGTH else whole[: len(answer.tokens)])
    assert sum(answer.finish is FinishReason.ERROR for answer in answers) == 2
    assert [answer.tokens for answer in harness.run(prompts, 80)] == expected


def test_a_fault_of_our_own_ends_streams_but_not_the_engine(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    faults = iter([True])
    real = Intake._accept

    def accept(intake: Intake, step: Step, results: np.ndarray, now: float) -> None:
        if next(faults, False):
            raise ZeroDivisionError("a bug")
        real(intake, step, results, now)

    with monkeypatch.context() as patch:
        patch.setattr(Intake, "_accept", accept)
        with harness.paused():
            names = [harness.submit(prompt, 60) for prompt in PROMPTS[:4]]
        answers = harness.collect(names)
    assert {answer.finish for answer in answers} == {FinishReason.ERROR}
    assert {answer.error for answer in answers} == {"internal error: ZeroDivisionError"}
    assert "the engine failed" in caplog.text
    assert len(harness.run([PROMPTS[0]], 20)[0].tokens) == 20


# ---- a pool that is too small for all


@pytest.fixture(scope="module")
def small(model: OpenModel) -> Iterator[Harness]:
    """A pool of 256 tokens, as little as one context, for 8 sequences."""
    probe = 2 * 2 * 4 * 4 * 6 * 16  # bytes of a page: layers, k and v, vshards, float32, head width, page size
    settings = {"layouts": ("tp1", "tp2"), "layout": "tp1", "kv_cache_gib": 16.5 * probe / 2**30}
    # Who has room is asked here, and not what machine code does: it need not be that of users.
    with compiling_quickly(), Harness(model, **settings) as harness:
        assert harness.engine._cell.memory.tokens == 256
        yield harness


def test_sequences_that_lose_their_blocks_lose_no_token(small: Harness) -> None:
    prompts = random_prompts(8, (5, 40), VOCAB, seed=21)
    expected, gap = generate(VARIANT, prompts, 60)
    assert gap > 1e-3
    before = small.engine.stats().sent_back
    answers = small.run(prompts, 60)
    assert small.engine.stats().sent_back > before  # 8 x 80 tokens do not fit in 256
    assert [list(answer.tokens) for answer in answers] == expected
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    small.assert_balanced()


def test_sampled_sequences_that_lose_their_blocks_say_the_same(small: Harness) -> None:
    prompts = random_prompts(6, (5, 40), VOCAB, seed=22)
    alone = [small.run([prompt], 60, temperature=1.0, seed=5)[0].tokens for prompt in prompts]
    before = small.engine.stats().sent_back
    together = [answer.tokens for answer in small.run(prompts, 60, temperature=1.0, seed=5)]
    assert small.engine.stats().sent_back > before
    assert together == alone
    small.assert_balanced()


def test_what_no_instance_can_hold_is_refused(small: Harness) -> None:
    model_len = small.engine.config.max_model_len
    assert model_len == 256
    (answer,) = small.run(random_prompts(1, (100, 100), VOCAB, seed=23), 156)  # to the last block
    assert len(answer.tokens) == 156
    small.assert_balanced()


def test_shrinking_to_a_smaller_pool_computes_anew_what_has_no_room(small: Harness) -> None:
    small.switch("tp2")  # twice the blocks
    prompts = random_prompts(8, (20, 30), VOCAB, seed=24)
    expected, gap = generate(VARIANT, prompts, 40)
    assert gap > 1e-3
    with small.paused():
        names = [small.submit(prompt, 40) for prompt in prompts]
        future = small.switch_when(names[-1], 10, "tp1")
    answers = small.collect(names)
    assert future.result(60).requeued > 0
    assert [list(answer.tokens) for answer in answers] == expected
    small.assert_balanced()
