"""Cells without Ray and without a model: fake engines behind the calls of a front door."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import nitsum_jax
from nitsum_jax.cluster.messages import CellEvents, CellFacts, CellGoneError, CellLeavesError, CellStatus
from nitsum_jax.control.routing.report import GRID, CellReport
from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import DEFAULT_TIERS, TierSet
from nitsum_jax.engine.engine import EngineStats
from nitsum_jax.engine.request import Request, RequestLimits, TokenDelta
from nitsum_jax.errors import NitsumError, OverloadedError
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.runtime.control.layout_log import LayoutChoice
from tests.server.fake_engine import FakeEngine, Script

REPORT_S = 0.02


class FakeCell:
    """A cell in this process; `die` and `hang` do to it what happens to processes."""

    def __init__(
        self,
        name: str,
        script: Script,
        *,
        version: str = "",
        tiers: TierSet = DEFAULT_TIERS,
        pooling: Pooling | None = None,
        **options: Any,
    ):
        self.name = name
        self.taken: list[Request] = []
        self.hung = False
        self.dead = False
        self.left = False
        self.lately: dict[str, tuple[int, int]] = {}
        self.decisions: tuple[LayoutChoice, ...] = ()
        self.full = False
        self._version = version or nitsum_jax.__version__
        self._tiers = tiers
        self._pooling = pooling
        self._queue: asyncio.Queue[CellEvents] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._doors: dict[str, str] = {}
        self.engine = FakeEngine(self._sink, script, **{"context": 10_000, **options})

    def die(self) -> None:
        """As kill -9: nothing more is said, calls fail."""
        self.dead = True
        self._wake()

    def leave(self) -> None:
        """As one that is taken away: it says so."""
        self.left = True
        self.die()

    def _wake(self) -> None:
        if self._loop is not None and self._queue is not None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, CellEvents())

    def hang(self, hung: bool = True) -> None:
        """As SIGSTOP and SIGCONT: calls are not answered meanwhile."""
        self.hung = hung

    async def facts(self) -> CellFacts:
        await self._reach()
        return CellFacts(self._version, "fake", self._tiers, ("cpu:0", "cpu:1"), "no memory", ("tp1x2", "tp2"), None)

    async def events(self, door: str) -> AsyncIterator[CellEvents]:
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()
        reporting = asyncio.create_task(self._report(self._queue))
        try:
            while True:
                events = await self._queue.get()
                await self._reach()
                yield events
        finally:
            reporting.cancel()

    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None:
        await self._reach()
        if self.full:
            return OverloadedError("the queue is full")
        if left_s is not None:
            request = dataclasses.replace(request, deadline_s=time.monotonic() + left_s)
        try:
            self.engine.submit(request)
        except NitsumError as error:
            return error
        self.taken.append(request)
        return None

    async def cancel(self, ids: Sequence[str]) -> None:
        await self._reach()
        for one in ids:
            self.engine.cancel(one)

    async def set_layout(self, layout: str, prepare: bool) -> Any:
        await self._reach()
        return await asyncio.wrap_future(self.engine.set_layout(layout))

    async def set_device(self, device: int, lost: bool) -> None:
        await self._reach()
        (self.engine.lose_device if lost else self.engine.restore_device)(device)

    async def _reach(self) -> None:
        while self.hung and not self.dead:
            await asyncio.sleep(0.005)
        if self.dead:
            raise CellLeavesError("it is taken away") if self.left else CellGoneError("the process was killed")

    def _sink(self, deltas: Sequence[TokenDelta]) -> None:
        if self._loop is not None and self._queue is not None:
            with contextlib.suppress(RuntimeError):  # the front door has ended
                self._loop.call_soon_threadsafe(self._queue.put_nowait, CellEvents(tuple(deltas)))

    async def _report(self, queue: asyncio.Queue[CellEvents]) -> None:
        while True:
            if not self.hung:
                queue.put_nowait(CellEvents(status=self.status()))
            await asyncio.sleep(REPORT_S)

    def status(self) -> CellStatus:
        stats = self.engine.stats()
        tiers = tuple(TierForecast(name, 0.01, 0.001) for name in DEFAULT_TIERS.names)
        report = CellReport(
            self.name, 0.0, tiers, tuple(t / 1e5 for t in GRID), 0.0, stats.waiting, stats.running, 10**6
        )
        names = {field.name for field in dataclasses.fields(EngineStats)} & {f.name for f in dataclasses.fields(stats)}
        counted = EngineStats(sent_back=0, **{name: getattr(stats, name) for name in names})
        limits = RequestLimits(257, DEFAULT_TIERS.names, 10_000, 10_000, pooling=self._pooling)
        return CellStatus(
            report,
            limits,
            counted,
            "tp1x2",
            ("tp1x2",),
            (),
            self.engine.compiling(),
            lately=self.lately,
            decisions=self.decisions,
        )
