"""Layouts that say which tiers their instances are kept for: the scheduling keeps them, the engine sees devices."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

import pytest

from nitsum_jax.engine.engine import Engine
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.runtime.scheduling.tiered_engine import tiered


class FakeEngine:
    """Switches when a test says so."""

    tier_names = ("chat", "code", "batch")
    device_names = tuple(f"device {i}" for i in range(8))

    def __init__(self) -> None:
        self.now = parse_layout("tp1x8", 8)
        self.asked: list[Layout] = []
        self.prepared: list[Layout] = []
        self.futures: list[concurrent.futures.Future[Any]] = []
        self.refuses = False
        self.posted: list[Callable[[], object]] = []

    def ask(self, call: Callable[[], object]) -> "concurrent.futures.Future[Any]":
        self.posted.append(call)
        return concurrent.futures.Future()

    def turn(self) -> None:
        """The engine's thread looks around."""
        for call in self.posted:
            call()
        self.posted.clear()

    def set_layout(self, layout: Layout) -> "concurrent.futures.Future[Any]":
        if self.refuses:
            raise PreconditionError("not this one")
        self.asked.append(layout)
        self.futures.append(concurrent.futures.Future())
        return self.futures[-1]

    def prepare_layout(self, layout: Layout) -> "concurrent.futures.Future[Any]":
        self.prepared.append(layout)
        return concurrent.futures.Future()

    def layout(self) -> Layout:
        return self.now

    def done(self) -> None:
        self.futures[-1].set_result(SwitchReport(str(self.now), str(self.asked[-1]), 0, 0, 0, 0.0, 0))
        self.now = self.asked[-1]


class FakeScheduling:
    """Is told what instances are kept for."""

    def __init__(self) -> None:
        self.kept = Layout(())

    def keep_for(self, plan: Layout) -> None:
        self.kept = plan


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def scheduling() -> FakeScheduling:
    return FakeScheduling()


@pytest.fixture
def engine(fake: FakeEngine, scheduling: FakeScheduling) -> Engine:
    return tiered(cast(Engine, fake), scheduling, Layout(()))


def test_the_engine_gets_devices_and_everybody_else_sees_tiers(fake: FakeEngine, engine: Engine) -> None:
    engine.set_layout("tp4/chat+tp1x4/code,batch")
    fake.done()
    assert fake.asked == [parse_layout("tp4+tp1x4", 8)]
    assert str(engine.layout()) == "tp4/chat+tp1x4/code,batch"
    engine.set_layout(engine.layout())  # what it says can be given back
    assert str(engine.layout()) == "tp4/chat+tp1x4/code,batch"
    assert len(fake.asked) == 1


def test_only_the_tiers_change_and_nothing_stops(fake: FakeEngine, engine: Engine) -> None:
    report = engine.set_layout("tp1x4/chat+tp1x4").result(timeout=0)
    assert (report.to_layout, report.sequences, report.stall_ms) == ("tp1x4/chat+tp1x4", 0, 0.0)
    assert not fake.asked
    assert str(engine.layout()) == "tp1x4/chat+tp1x4"
    engine.set_layout("tp1x8")
    assert str(engine.layout()) == "tp1x8"  # a layout without tiers keeps nothing for anybody


def test_the_scheduling_is_told_on_the_engines_thread(
    fake: FakeEngine, engine: Engine, scheduling: FakeScheduling
) -> None:
    engine.set_layout("tp1x4/chat+tp1x4")
    engine.set_layout("tp1x4/code+tp1x4")
    assert str(engine.layout()) == "tp1x4/code+tp1x4"  # whoever asks sees at once what was asked for
    assert scheduling.kept == Layout(())
    fake.turn()
    assert scheduling.kept == parse_layout("tp1x4/code+tp1x4", 8)


def test_a_refused_layout_leaves_the_tiers(fake: FakeEngine, engine: Engine) -> None:
    engine.set_layout("tp1x2/chat+tp1x6")
    fake.refuses = True
    with pytest.raises(PreconditionError, match="not this one"):
        engine.set_layout("tp4x2/code")
    assert str(engine.layout()) == "tp1x2/chat+tp1x6"


def test_a_switch_that_fails_leaves_the_tiers_unless_another_was_asked_for(fake: FakeEngine, engine: Engine) -> None:
    engine.set_layout("tp1x2/chat+tp1x6")
    engine.set_layout("tp4x2/code")
    fake.futures[0].set_exception(PreconditionError("it does not compile"))
    assert str(engine.layout()) == "tp1x2/chat+tp1x6"
    engine.set_layout("tp4x2/code")
    engine.set_layout("tp1x8/batch")  # asked of the engine, for tp4x2 is still to come
    fake.futures[1].set_exception(PreconditionError("it does not compile"))
    assert len(fake.asked) == 3
    assert str(engine.layout()) == "tp1x8/batch"


def test_unknown_tiers_are_refused(fake: FakeEngine, engine: Engine) -> None:
    for change in (engine.set_layout, engine.prepare_layout):
        with pytest.raises(InvalidInputError, match="names the tier 'gold': give one of chat, code, batch"):
            change("tp8/gold")
    assert not fake.asked


def test_tiers_make_no_difference_to_what_is_compiled(fake: FakeEngine, engine: Engine) -> None:
    engine.prepare_layout("tp8/chat")
    assert fake.prepared == [parse_layout("tp8", 8)]
    assert str(engine.layout()) == "tp1x8"
