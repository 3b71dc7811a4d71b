"""A cell as its process has it: an engine, and what front doors may ask of it.

It knows no transport.  Deltas of a step travel in one message, and a status goes out a few times a second; it is made
on the engine's thread, so that an engine that hangs is as silent as a process that does.
"""

import asyncio
import collections
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import nitsum_jax
from nitsum_jax.cluster.messages import CellEvents, CellFacts, CellStatus
from nitsum_jax.control.planning.cell_view import JobView
from nitsum_jax.control.routing.report import make_report
from nitsum_jax.control.routing.scaling import CellPressure, pressure_of
from nitsum_jax.engine.config import prefix_granule
from nitsum_jax.engine.request import Request, TokenDelta
from nitsum_jax.errors import NitsumError, PreconditionError
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.runtime.structured.forms import FormSpec
from nitsum_jax.server.launch.flags import LaunchOptions
from nitsum_jax.server.launch.main import Loaded, controller_of, load_engine

if TYPE_CHECKING:
    from nitsum_jax.engine.switching.switch import SwitchReport

_MOST_PREFIXES = 2048
_RECENT_S = 60.0  # for how long the end of a request counts
_MOST_ENDS = 4096
_JUDGED = 256  # latest ends by which the autoscaler judges
_TOLD = 10  # decisions and switches


class CellHost:
    """One engine for any number of front doors; its methods run on one event loop."""

    def __init__(self, name: str, options: LaunchOptions, report_s: float):
        """Loads the model; takes as long as that takes.

        Args:
          name: of the cell.
          options: of nitsum-serve.
          report_s: seconds between two statuses.

        Raises:
          NitsumError: model, devices, layout or memory do not fit.
        """
        self._name = name
        self._report_s = report_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._doors: dict[str, asyncio.Queue[CellEvents]] = {}
        self._door_of: dict[str, str] = {}
        self._ends: collections.deque[tuple[float, str, bool]] = collections.deque(maxlen=_MOST_ENDS)
        self._log = LayoutLog()
        self._status: CellStatus | None = None
        loaded: Loaded = load_engine(options, self._sink, self._admitted)
        assert loaded.scheduled is not None
        self._engine, self._scheduled = loaded.scheduled.engine, loaded.scheduled
        self._model = loaded.model.name
        self._forms = loaded.model.forms
        self._scheduled.scheduling.finished_listeners.append(self._ended)
        self._control = None
        make = controller_of(with_own_log(options, name), self._scheduled)
        if make is not None:
            self._control = make(self._engine, self._log)
            self._control.start()

    async def facts(self) -> CellFacts:
        """What does not change."""
        engine = self._engine
        return CellFacts(
            nitsum_jax.__version__,
            self._model,
            self._scheduled.tiers,
            engine.device_names,
            engine.memory_report,
            engine.allowed_layouts(),
            prefix_granule(engine.config),
        )

    async def events(self, door: str) -> AsyncIterator[CellEvents]:
        """What happens, for one front door, until it stops reading; then its requests end."""
        self._loop = asyncio.get_running_loop()
        queue: asyncio.Queue[CellEvents] = asyncio.Queue()
        self._doors[door] = queue
        reporting = asyncio.create_task(self._report(queue))
        try:
            while True:
                found = [await queue.get()]
                while not queue.empty():
                    found.append(queue.get_nowait())
                yield _merged(found)
        finally:
            reporting.cancel()
            del self._doors[door]
            for request_id in [one for one, owner in self._door_of.items() if owner == door]:
                self._engine.cancel(request_id)

    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None:
        """Takes a request of a front door that reads its events; returns why not.

        Args:
          door: of the front door.
          request: its deadline is on another clock.
          left_s: until it is given up; None: never.
        """
        if left_s is not None:
            request = dataclasses.replace(request, deadline_s=time.monotonic() + left_s)
        self._door_of[request.id] = door
        try:
            spec: Any = request.form
            if isinstance(spec, FormSpec):
                if self._forms is None:
                    raise PreconditionError(f"outputs of model {self._model} cannot be held to a form")
                form = await asyncio.to_thread(self._forms.compile, spec)
                request = dataclasses.replace(request, form=form)
            self._engine.submit(request)
        except NitsumError as error:
            del self._door_of[request.id]
            return error
        return None

    async def cancel(self, ids: Sequence[str]) -> None:
        """Ends requests; unknown ids are ignored."""
        for request_id in ids:
            self._engine.cancel(request_id)

    async def set_layout(self, layout: str, prepare: bool) -> "SwitchReport":
        """Changes the layout, or only compiles what it needs."""
        change = self._engine.prepare_layout if prepare else self._engine.set_layout
        return await asyncio.wrap_future(change(layout))

    async def set_device(self, device: int, lost: bool) -> None:
        """Says that a device failed, or is back."""
        (self._engine.lose_device if lost else self._engine.restore_device)(device)

    def pressure(self) -> CellPressure:
        """How far it is from missing its targets, for the autoscaler."""
        met = [met for _, met in self._recent()][-_JUDGED:]
        tiers = () if self._status is None else self._status.report.tiers
        return pressure_of(self._scheduled.tiers, tiers, met, self._scheduled.scheduling.time_scale)

    @property
    def streams(self) -> int:
        """Requests that are alive."""
        return len(self._door_of)

    def close(self) -> None:
        """Ends everything."""
        if self._control is not None:
            self._control.close()
        self._engine.close()

    # ---- on the engine's thread

    def _sink(self, deltas: Sequence[TokenDelta]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._dispatch, tuple(deltas))

    def _admitted(self, request_id: str, now_s: float) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._tell_admitted, request_id)

    def _ended(self, now_s: float, job: JobView) -> None:
        self._ends.append((time.monotonic(), job.tier, job.met))

    def _recent(self) -> list[tuple[str, bool]]:
        """Tiers of the requests that ended lately, and whether they met their targets."""
        since_s = time.monotonic() - _RECENT_S  # what was missed in a rush keeps no cell for ever
        return [(tier, met) for ended_s, tier, met in list(self._ends) if ended_s >= since_s]

    def _lately(self) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        for tier, met in self._recent():
            counted, good = found.get(tier, (0, 0))
            found[tier] = counted + 1, good + met
        return found

    def _look(self) -> CellStatus:
        engine, scheduling = self._engine, self._scheduled.scheduling
        prefixes = engine.cell.prefixes
        held = frozenset() if prefixes is None else prefixes.latest_keys(_MOST_PREFIXES)
        report = make_report(
            self._name, scheduling.scheduler, scheduling.workers(), scheduling.now_s(), prefixes=held
        ).scaled(scheduling.time_scale)
        return CellStatus(
            report,
            engine.request_limits(),
            engine.stats(),
            str(engine.layout()),
            engine.ready_layouts(),
            engine.loads(),
            engine.compiling(),
            engine.lost_devices(),
            self._lately(),
            self._log.decisions()[-_TOLD:],
            self._log.switches()[-_TOLD:],
        )

    # ---- on the event loop

    async def _report(self, queue: asyncio.Queue[CellEvents]) -> None:
        while True:
            self._status = await asyncio.wrap_future(self._engine.ask(self._look))
            queue.put_nowait(CellEvents(status=self._status))
            await asyncio.sleep(self._report_s)

    def _dispatch(self, deltas: tuple[TokenDelta, ...]) -> None:
        by_door: dict[str, list[TokenDelta]] = {}
        for delta in deltas:
            door = self._door_of.get(delta.request_id)
            if door is None:
                continue
            by_door.setdefault(door, []).append(delta)
            if delta.finish_reason is not None:
                del self._door_of[delta.request_id]
        for door, found in by_door.items():
            self._put(door, CellEvents(deltas=tuple(found)))

    def _tell_admitted(self, request_id: str) -> None:
        door = self._door_of.get(request_id)
        if door is not None:
            self._put(door, CellEvents(admitted=(request_id,)))

    def _put(self, door: str, events: CellEvents) -> None:
        queue = self._doors.get(door)
        if queue is not None:
            queue.put_nowait(events)


def with_own_log(options: LaunchOptions, cell: str) -> LaunchOptions:
    """The options with a decision log of this cell alone: a replay knows one cell, and several may share a folder."""
    control = options.control
    if control.log is None:
        return options
    path = pathlib.Path(control.log)
    log = str(path.with_name(f"{path.stem}.{cell}{path.suffix}"))
    return dataclasses.replace(options, control=dataclasses.replace(control, log=log))


def _merged(found: Sequence[CellEvents]) -> CellEvents:
    if len(found) == 1:
        return found[0]
    deltas: list[Any] = []
    admitted: list[str] = []
    status = None
    for one in found:
        deltas += one.deltas
        admitted += one.admitted
        status = one.status or status
    return CellEvents(tuple(deltas), tuple(admitted), status)
