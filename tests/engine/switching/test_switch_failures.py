"""An error at any stage of a switch leads back to the old layout; a lost device costs time, but no token."""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.history import HistoryMover
from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.transfer import BlockMover
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.switching import switch
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.weight_bank import WeightBank
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT, VOCAB = "llama_odd", 93
PROMPTS = [prompt for size in (1, 20, 33, 60, 90, 75, 8, 40) for prompt in random_prompts(1, (size, size), VOCAB, size)]
LENGTH = 100

# Every stage of a switch in its order: what is called there, and after how many calls it fails.
STAGES: dict[str, tuple[object, str, int]] = {
    "planning": (switch, "plan_moves", 1),
    "the first copy": (BlockMover, "move", 1),
    "a later copy": (BlockMover, "move", 5),
    "fetching weights": (WeightBank, "fetch", 1),
    "wrapping weights": (Cell, "leaves", 1),
    "lending a pool": (KvPool, "lend", 1),
    "making an instance": (Cell, "instance", 1),
    "seating sequences": (Instance, "adopt", 1),
    "copying histories": (HistoryMover, "merge", 1),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model(VARIANT, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: OpenModel) -> Iterator[Harness]:
    # As on an accelerator: nothing is drained, so that each stage has steps in flight.
    with Harness(model, deterministic=True, drain_before_switch=False) as harness:
        harness.engine.wait_for_layouts()
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    """The engine in tp1x4; afterwards nothing may be left of a test."""
    shared.switch("tp1x4")
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


@pytest.fixture(scope="module")
def undisturbed(shared: Harness) -> list[tuple[int, ...]]:
    """What the streams say without a switch."""
    return [answer.tokens for answer in shared.run(PROMPTS, LENGTH)]


def failing(real: Callable[..., Any], calls: int, *, before: bool) -> Callable[..., Any]:
    """A function that fails at its n-th call, before or after it has done its work."""
    count = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls and before:
            raise RuntimeError("the link is down")
        result = real(*args, **kwargs)
        if count == calls:
            raise RuntimeError("the link is down")
        return result

    return call


# What was lent or made and then forgotten is a state that no error of these two stages leaves behind.
WHOLE = ("lending a pool", "making an instance")


@pytest.mark.parametrize(
    ("stage", "before"),
    [(stage, before) for stage in STAGES for before in (True, False) if before or stage not in WHOLE],
)
def test_an_error_at_any_stage_leads_back_with_all_streams_alive(
    harness: Harness,
    undisturbed: list[tuple[int, ...]],
    stage: str,
    before: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner, name, calls = STAGES[stage]
    sent_back = harness.engine.stats().sent_back
    if owner is HistoryMover:  # it has something to do when tokens are in flight: here results come late
        real = type(harness.engine._running)._on_step

        def on_step(loop: Any, instance: Instance, step: Any) -> None:
            time.sleep(0.02)
            real(loop, instance, step)

        for instance in harness.engine._running.instances:
            monkeypatch.setattr(instance, "_on_step", functools.partial(on_step, harness.engine._running))
    with harness.paused():
        names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS]
        # The failure is set up at the moment of the switch: instances that run call some of these too.
        harness.recorder.when(
            names[7], 5, lambda: monkeypatch.setattr(owner, name, failing(getattr(owner, name), calls, before=before))
        )
        future = harness.switch_when(names[7], 5, "tp4")
    with pytest.raises(PreconditionError, match="the switch failed and tp1x4 stays: the link is down"):
        future.result(60)
    monkeypatch.undo()
    assert str(harness.engine.layout()) == "tp1x4"
    assert [answer.tokens for answer in harness.collect(names)] == undisturbed
    assert harness.engine.stats().sent_back == sent_back  # nothing was computed anew
    assert sum(record.levelno >= logging.ERROR for record in caplog.records) == 1
    assert harness.switch("tp4").to_layout == "tp4"  # the link is up again


def test_what_a_broken_copy_took_with_it_is_computed_anew(
    harness: Harness, undisturbed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = BlockMover.move

    def move(mover: BlockMover, source: int, target: int, *blocks: Any) -> Any:
        if target == 3:
            mover._pool.array(3).delete()  # as when an executable that it was donated to fails
            raise RuntimeError("the link is down")
        return real(mover, source, target, *blocks)

    sent_back = harness.engine.stats().sent_back
    with monkeypatch.context() as patch:
        patch.setattr(BlockMover, "move", move)
        with harness.paused():
            names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS]
            future = harness.switch_when(names[7], 5, "tp4")
        with pytest.raises(PreconditionError, match="tp1x4 stays"):
            future.result(60)
    assert [answer.tokens for answer in harness.collect(names)] == undisturbed
    assert harness.engine.stats().sent_back == sent_back + 2  # those of device 3


def test_a_failed_switch_frees_what_it_took_on_idle_devices(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Harness(model, deterministic=True, layouts=("tp1", "tp2", "tp4"), layout="tp1") as harness:
        harness.engine.wait_for_layouts()
        with harness.paused():
            names = [harness.submit(prompt, 60) for prompt in PROMPTS[:4]]
            harness.recorder.when(
                names[3], 2, lambda: monkeypatch.setattr(Instance, "adopt", failing(Instance.adopt, 1, before=False))
            )
            future = harness.switch_when(names[3], 2, "tp4")
        with pytest.raises(PreconditionError, match="tp1 stays"):
            future.result(60)
        monkeypatch.undo()
        assert {answer.finish for answer in harness.collect(names)} == {FinishReason.LENGTH}
        eventually(lambda: harness.engine.stats().running == 0)
        harness.assert_balanced()
        assert harness.switch("tp4").to_layout == "tp4"


# ---- loss of a device


@pytest.mark.parametrize("layout", ["tp1x4", "tp2x2"])
def test_streams_go_on_without_a_lost_device(
    model: OpenModel, undisturbed: list[tuple[int, ...]], layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Harness(model, deterministic=True, layouts=None, layout=layout, drain_before_switch=False) as harness:
        harness.engine.wait_for_layouts(("tp1x4", layout))
        with harness.paused():
            names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS]
            harness.recorder.when(names[7], 5, lambda: harness.engine.lose_device(1))
        assert [answer.tokens for answer in harness.collect(names)] == undisturbed
        stats = harness.engine.stats()
        assert stats.sent_back > 0
        survivors = {d for instance in harness.engine.layout().instances for d in instance.devices}
        assert survivors == {0, 2, 3}  # device 0 goes on alone where it had shared its instance
        with pytest.raises(PreconditionError, match="uses device 1, which is lost"):
            harness.ask_for("tp4")
        assert "device 1 is lost" in caplog.text
        assert [answer.tokens for answer in harness.run(PROMPTS, LENGTH)] == undisturbed


def test_when_no_device_is_left_streams_end_with_an_error(model: OpenModel) -> None:
    with Harness(model, devices=1, layouts=None) as harness:
        with harness.paused():
            names = [harness.submit(prompt, LENGTH) for prompt in PROMPTS[:2]]
            harness.recorder.when(names[1], 3, lambda: harness.engine.lose_device(0))
        answers = harness.collect(names)
        assert {answer.error for answer in answers} == {"no device is left that can serve: restart the server"}
        with pytest.raises(PreconditionError):
            harness.submit((1, 2), 5)
        with pytest.raises(InvalidInputError, match="there is no device 5"):
            harness.engine.lose_device(5)
