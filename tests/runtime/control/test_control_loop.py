"""The controller of a live cell, with an engine that only remembers what it was asked for."""

import concurrent.futures
import json
import pathlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import ControllerConfig
from nitsum_jax.control.planning.decision import PlanInputs
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.tiers import Tier
from nitsum_jax.errors import PreconditionError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.runtime.control import control_loop
from nitsum_jax.runtime.control.control_loop import ControlLoop, Listener, Mode
from nitsum_jax.runtime.control.decision_log import DecisionLog
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.runtime.control.planner_process import PlannerError
from tests.control.profiles import roofline_profile

COST = CostModel(roofline_profile())
CHAT, CODE = Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100)
T = TypeVar("T")
CONFIG = ControllerConfig(interval_s=0.1, warm_up_s=0.2, dwell_s=0.0)


class Report:
    from_layout, to_layout, stall_ms, sequences = "a", "b", 1.0, 2
    kv_bytes_moved = weight_bytes_moved = requeued = 0


class FakeEngine:
    """Switches at once."""

    def __init__(self) -> None:
        self.plan = homogeneous(8, 1)
        self.asked: list[str] = []
        self.prepared: list[str] = []
        self.lost: tuple[int, ...] = ()
        self.refuses: Exception | None = None
        self.calls = 0
        self.answers = True
        self.unanswered = 0
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "engine")
        self.device_names = tuple(f"device {i}" for i in range(8))

    def set_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        self.calls += 1
        if self.refuses is not None:
            raise self.refuses
        self.asked.append(layout)
        self.plan = parse_layout(layout, 8)
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(Report())
        return future

    def prepare_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        self.prepared.append(layout)
        return concurrent.futures.Future()

    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]":
        if self.answers:
            return self.thread.submit(call)
        self.unanswered += 1
        return concurrent.futures.Future()

    def allowed_layouts(self) -> tuple[str, ...]:
        return ()

    def lost_devices(self) -> tuple[int, ...]:
        return self.lost


class FakeScheduling:
    """Tells of requests when a test says so; its clock is the machine's."""

    time_scale = 1.0

    def __init__(self, engine: FakeEngine) -> None:
        self.arrived_listeners: list[Listener] = []
        self.finished_listeners: list[Listener] = []
        self.seen_on: set[str] = set()  # threads
        self._engine = engine

    def now_s(self) -> float:
        return time.monotonic()

    def view(self, num_devices: int, lost: tuple[int, ...] = (), allowed: tuple[str, ...] = ()) -> CellView:
        self.seen_on.add(threading.current_thread().name)
        return CellView(self._engine.plan, num_devices, lost=lost, allowed=allowed)

    def count_late(self, ids: Collection[str]) -> int:
        self.seen_on.add(threading.current_thread().name)
        return 0

    def tight_chat(self, rate: float = 60.0, seconds: float = 2.0) -> None:
        """Requests as of the last seconds, all at once."""
        now, generator = self.now_s(), random.Random(0)
        for i in range(int(rate * seconds)):
            job = ModelJob(str(i), CHAT, now, generator.randint(200, 1500), 150, generated=150)
            job.first_token_s, job.finish_s = now + 0.1, now + 0.9
            for listener in self.arrived_listeners:
                listener(now, JobView.of(job))
            for listener in self.finished_listeners:
                listener(now, JobView.of(job))


def in_process(loop: ControlLoop) -> None:
    """Plans in this process: starting another for each test takes its time (see test_planner_process)."""
    planner = Planner(COST, (CHAT, CODE))
    loop._process.start = lambda: None  # type: ignore[method-assign]
    loop._process.decide = lambda inputs, ratios=None: planner.decide(inputs)  # type: ignore[method-assign]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    fake = FakeEngine()
    yield fake
    fake.thread.shutdown()


@pytest.fixture
def scheduling(engine: FakeEngine) -> FakeScheduling:
    return FakeScheduling(engine)


@pytest.fixture
def start(engine: FakeEngine, scheduling: FakeScheduling) -> Iterator[Callable[..., ControlLoop]]:
    loops = []

    def make(mode: Mode, log: DecisionLog | None = None) -> ControlLoop:
        layout_log = LayoutLog()
        loop = ControlLoop(engine, scheduling, COST, (CHAT, CODE), layout_log, mode=mode, config=CONFIG, log=log)
        in_process(loop)
        loop.start()
        loops.append(loop)
        return loop

    yield make
    for loop in loops:
        loop.close()


Start = Callable[..., ControlLoop]


def test_it_changes_a_layout_that_is_too_slow(engine: FakeEngine, scheduling: FakeScheduling, start: Start) -> None:
    loop = start(Mode.ON)
    scheduling.tight_chat()
    wait_for(lambda: engine.asked)
    assert max(i.tp for i in parse_layout(engine.asked[0], 8).instances) > 1
    told = loop.explain()
    assert told.applied
    assert told.decision is not None
    assert "predicted to meet" in told.decision["reason"]
    wait_for(lambda: engine.prepared)  # likely next ones are compiled ahead


def test_the_cell_is_looked_at_on_the_engines_thread_alone(
    engine: FakeEngine, scheduling: FakeScheduling, start: Start
) -> None:
    start(Mode.ON)
    scheduling.tight_chat()
    wait_for(lambda: engine.asked)
    assert scheduling.seen_on == {"engine_0"}


def test_an_engine_that_is_busy_for_long_gets_no_decision(
    engine: FakeEngine, scheduling: FakeScheduling, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_loop, "_ENGINE_S", 0.05)
    engine.answers = False
    loop = start(Mode.ON)
    scheduling.tight_chat()
    wait_for(lambda: engine.unanswered > 1)
    assert loop.explain().decision is None
    engine.answers = True
    wait_for(lambda: engine.asked)  # and it goes on once the engine answers


def test_advice_is_given_and_not_followed(engine: FakeEngine, scheduling: FakeScheduling, start: Start) -> None:
    loop = start(Mode.ADVISE)
    scheduling.tight_chat()
    wait_for(lambda: loop.explain().decision and loop.explain().decision["switch"])  # type: ignore[index]
    assert not engine.asked
    assert not loop.explain().applied


def test_paused_it_decides_nothing(engine: FakeEngine, scheduling: FakeScheduling, start: Start) -> None:
    loop = start(Mode.ON)
    loop.pause()
    scheduling.tight_chat()
    time.sleep(0.6)
    assert not engine.asked
    loop.resume()
    wait_for(lambda: engine.asked)


def test_a_planner_that_fails_leaves_the_layout(engine: FakeEngine, scheduling: FakeScheduling, start: Start) -> None:
    loop = start(Mode.ON)

    def fail(inputs: PlanInputs, ratios: object = None) -> None:
        raise PlannerError("no decision within 5 s")

    loop._process.decide = fail  # type: ignore[method-assign,assignment]
    scheduling.tight_chat()
    wait_for(lambda: loop.explain().failures > 1)
    assert not engine.asked


def test_a_layout_that_the_engine_refuses_changes_nothing(
    engine: FakeEngine, scheduling: FakeScheduling, start: Start
) -> None:
    engine.refuses = PreconditionError("not this one")
    before = engine.plan
    loop = start(Mode.ON)
    scheduling.tight_chat()
    wait_for(lambda: engine.calls >= 2)  # it goes on deciding
    assert engine.plan == before
    assert loop.explain().failures == 0


def test_decisions_can_be_made_again_from_the_log(
    engine: FakeEngine, scheduling: FakeScheduling, start: Start, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    start(Mode.ON, DecisionLog(path))
    scheduling.tight_chat()
    wait_for(lambda: engine.asked)
    planner = Planner(COST, (CHAT, CODE))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries
    for entry in entries:
        assert planner.decide(PlanInputs.from_json(entry["inputs"])).choice.unplaced == entry["choice"]


def test_without_a_planner_there_is_nothing_to_pause(engine: FakeEngine, scheduling: FakeScheduling) -> None:
    loop = ControlLoop(engine, scheduling, COST, (CHAT, CODE), LayoutLog(), mode=Mode.OFF)
    loop.start()
    with pytest.raises(PreconditionError, match="--planner=on"):
        loop.pause()
    assert not scheduling.arrived_listeners
    loop.close()
