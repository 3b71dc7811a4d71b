"""The controller of a live cell: watches requests, asks the planner, changes the layout.

Concurrency. The engine's thread reports requests by appending to a deque, which costs it a microsecond. A
thread of this module takes them in, a few times a second, and at its ticks asks the planner, which is another process.
What it knows of the cell are copies (`control.planning.cell_view`), which the engine's thread makes between two steps
when it is asked to: no job, worker or queue is read while it may change. So a control loop never delays a step by more
than such a copy, and whatever goes wrong in it leaves the layout as it is.

Times here are on the clock of tiers and profile (`TieredScheduling.now_s`), which a paced cell stretches.
"""

import collections
import concurrent.futures
import dataclasses
import enum
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Protocol, TypeVar

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import place
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import AdaptiveController, ControllerConfig
from nitsum_jax.control.planning.decision import Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.tiers import Tier
from nitsum_jax.errors import NitsumError, PreconditionError
from nitsum_jax.meshes.layout import Layout, parse_shapes
from nitsum_jax.runtime.control.decision_log import DecisionLog
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.runtime.control.planner_process import PlannerError, PlannerProcess

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.25
_LIKELY = 2  # other plans of a decision whose executables are compiled ahead
_LEAVE_S = 5.0
_ENGINE_S = 2.0  # wait for the engine's thread, which may be amid a switch

T = TypeVar("T")
Listener = Callable[[float, JobView], None]


class Mode(enum.StrEnum):
    """What the controller may do."""

    OFF = "off"  # nothing
    ADVISE = "advise"  # decides and logs
    ON = "on"  # decides and switches


class ControlledEngine(Protocol):
    """The part of an engine that is used here; see `engine.Engine`."""

    # ruff: noqa: D102
    @property
    def device_names(self) -> tuple[str, ...]: ...
    def set_layout(self, layout: str) -> "concurrent.futures.Future[Any]": ...
    def prepare_layout(self, layout: str) -> "concurrent.futures.Future[Any]": ...
    def allowed_layouts(self) -> tuple[str, ...]: ...
    def lost_devices(self) -> tuple[int, ...]: ...
    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]": ...


class ControlledScheduling(Protocol):
    """The part of the scheduling that is used here; see `scheduling.TieredScheduling`."""

    arrived_listeners: list[Listener]
    finished_listeners: list[Listener]

    @property
    def time_scale(self) -> float: ...
    def now_s(self) -> float: ...
    def view(self, num_devices: int, lost: tuple[int, ...] = (), allowed: tuple[str, ...] = ()) -> CellView: ...
    def count_late(self, ids: Collection[str]) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Explanation:
    """The state of the controller, for administrators.

    Attributes:
      mode: what it may do.
      paused: whether an administrator has paused it.
      decision: the last one, as `Decision.to_json`; None before the first.
      applied: whether it was carried out.
      plan_s: how long planning took.
      failures: of the planner, since the start.
    """

    mode: Mode
    paused: bool
    decision: Mapping[str, Any] | None
    applied: bool
    plan_s: float | None
    failures: int


class ControlLoop:
    """See the module; started by `start`."""

    def __init__(
        self,
        engine: ControlledEngine,
        scheduling: ControlledScheduling,
        cost: CostModel,
        tiers: Iterable[Tier],
        layout_log: LayoutLog,
        *,
        mode: Mode,
        config: ControllerConfig = ControllerConfig(),
        planner: PlannerConfig = PlannerConfig(),
        log: DecisionLog | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        """Watches nothing yet.

        Args:
          engine: whose layout is changed.
          scheduling: of the engine.
          cost: what the scheduling predicts with.
          tiers: targets.
          layout_log: gets every decision and switch.
          mode: what it may do.
          config: when to plan.
          planner: how to plan.
          log: gets every decision with its inputs.
          timeout_s: longest wait for the planner.
        """
        tiers = tuple(tiers)
        self._engine = engine
        self._scheduling = scheduling
        self._cost = cost
        self._layout_log = layout_log
        self._log = log
        self._mode = mode
        self._process = PlannerProcess(cost.profile, tiers, planner, timeout_s=timeout_s)
        self._controller = AdaptiveController(
            cost, tiers, config=config, planner=planner, now_s=scheduling.now_s(), decide=self._ask
        )
        self._allowed = engine.allowed_layouts()
        self._news: collections.deque[tuple[bool, float, JobView]] = collections.deque()
        self._stop = threading.Event()
        self._paused = False
        self._last: Decision | None = None
        self._applied = False
        self._plan_s: float | None = None
        self._ratios: dict[int, tuple[float, float]] | None = None
        self._failures = 0
        self._thread_s = 0.0
        self._prepared: set[str] = set()
        self._switching: concurrent.futures.Future[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="nitsum-control", daemon=True)

    @property
    def mode(self) -> Mode:
        """What it may do."""
        return self._mode

    @property
    def cpu_s(self) -> float:
        """Processor seconds of the control thread, and of its planner's answers; on any thread."""
        return self._thread_s + self._process.cpu_s

    def start(self) -> None:
        """Begins to watch and, unless it is off, to decide."""
        if self._mode is Mode.OFF:
            return
        self._scheduling.arrived_listeners.append(lambda now, job: self._news.append((True, now, job)))
        self._scheduling.finished_listeners.append(lambda now, job: self._news.append((False, now, job)))
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and the planner's process."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_LEAVE_S)
        self._process.close()
        if self._log is not None:
            self._log.close()

    # ---- administration; on any thread

    def pause(self) -> None:
        """No decision until `resume`; the layout stays, and may be set by hand.

        Raises:
          PreconditionError: the server was started without a planner.
        """
        self._require_planner()
        self._paused = True

    def resume(self) -> None:
        """Decides again.

        Raises:
          PreconditionError: the server was started without a planner.
        """
        self._require_planner()
        self._paused = False

    def explain(self) -> Explanation:
        """What was decided last, and from what."""
        last = self._last
        decision = None if last is None else last.to_json() | {"choice_text": last.choice.unplaced}
        return Explanation(self._mode, self._paused, decision, self._applied, self._plan_s, self._failures)

    def _require_planner(self) -> None:
        if self._mode is Mode.OFF:
            raise PreconditionError("there is no planner: start the server with --planner=on or --planner=advise")

    # ---- the control thread

    def _run(self) -> None:
        scale = self._scheduling.time_scale
        controller = self._controller
        next_tick_s = self._scheduling.now_s() + controller.interval_s
        try:
            self._process.start()
        except OSError as error:
            _LOG.error("the planner's process does not start: %s", error)
        while not self._stop.wait(min(_LOOK_S, controller.interval_s / 4) * min(scale, 4.0)):
            self._thread_s = time.thread_time()
            try:
                now = self._scheduling.now_s()
                self._take_in()
                if now < next_tick_s and not controller.urgent(now, self._count_late):
                    continue
                next_tick_s = now + controller.interval_s
                self._tick(now)
            except Exception:  # a fault in here must not end control for good
                _LOG.exception("the control loop failed at a tick; the layout stays")

    def _take_in(self) -> None:
        while self._news:
            came, now, job = self._news.popleft()
            if came:
                self._controller.arrived(now, job)
            else:
                self._controller.finished(now, job)

    def _tick(self, now: float) -> None:
        if self._paused or (self._switching is not None and not self._switching.done()):
            return
        devices, lost = len(self._engine.device_names), self._engine.lost_devices()
        view = self._on_engine(lambda: self._scheduling.view(devices, lost, self._allowed))
        if view is None:
            return
        before = view.plan
        decision = self._controller.tick(now, view)
        if decision is None:
            return
        apply = decision.switch and self._mode is Mode.ON
        self._last, self._applied = decision, apply
        if self._log is not None:
            self._log.write(decision, self._ratios)
        if decision.switch:
            advice = "" if apply else " (advice only)"
            self._layout_log.decide(decision.choice.unplaced, decision.reason + advice, self._plan_s)
        if apply:
            self._apply(before, decision.choice)
        self._prepare(decision)

    def _count_late(self, ids: Collection[str]) -> int:
        asked = tuple(ids)
        return self._on_engine(lambda: self._scheduling.count_late(asked)) or 0

    def _on_engine(self, call: Callable[[], T]) -> T | None:
        """What the engine's thread answers; None if it is busy with something else for long, or has ended."""
        answer = self._engine.ask(call)
        try:
            return answer.result(_ENGINE_S)
        except concurrent.futures.TimeoutError:
            answer.cancel()
            _LOG.info("the engine's thread was busy for %g s: nothing is decided now", _ENGINE_S)
            return None

    def _ask(self, inputs: PlanInputs) -> Decision | None:
        self._ratios = self._cost.learnt() or None
        start = time.monotonic()
        try:
            decision = self._process.decide(inputs, self._ratios)
        except PlannerError as error:
            self._failures += 1
            _LOG.error("%s; the layout stays", error)
            return None
        self._plan_s = time.monotonic() - start
        return decision

    def _apply(self, before: Layout, after: Layout) -> None:
        try:
            self._switching = self._engine.set_layout(after.placed)
        except NitsumError as error:
            _LOG.error("the engine refuses %s: %s", after.placed, error)
            return
        if {i.group for i in before.instances} != {i.group for i in after.instances}:  # else only tiers change
            self._layout_log.watch(after.placed, self._switching)

    def _prepare(self, decision: Decision) -> None:
        """Has executables compiled that are likely to be wanted next."""
        count, lost = len(self._engine.device_names), self._engine.lost_devices()
        for candidate in decision.candidates[1 : 1 + _LIKELY]:
            try:
                layout = place(parse_shapes(candidate.plan), count, decision.choice, lost).placed
                if layout not in self._prepared:
                    self._prepared.add(layout)
                    self._engine.prepare_layout(layout)
            except (NitsumError, ValueError) as error:
                _LOG.debug("%s cannot be prepared: %s", candidate.plan, error)
