"""All that watches a running server: metrics, log, traces, layout log, dashboard. Notified once per request."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter

import nitsum_jax
from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import NitsumError
from nitsum_jax.runtime.backend import ManyCells, OneCell, ServingEngine, ServingStats
from nitsum_jax.runtime.control.layout_log import KEPT, LayoutLog
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.operations.dashboard.feed import Feed
from nitsum_jax.server.operations.dashboard.snapshot import CellBox, DashboardSnapshot, InstanceView, TierView, Totals
from nitsum_jax.server.operations.logs import log_request
from nitsum_jax.server.operations.metrics.cell import CellCollector, SwitchMetrics
from nitsum_jax.server.operations.metrics.requests import RequestMetrics
from nitsum_jax.server.operations.metrics.window import WINDOW_S, Windows
from nitsum_jax.server.operations.tracing import RequestTracer
from nitsum_jax.server.security.engine_access import access_checked
from nitsum_jax.server.security.guard import REASONS
from nitsum_jax.server.state import ServerPhase

_LOOK_S = 0.25


class Operations:
    """Watches one engine; a RequestObserver and a StatusSource."""

    def __init__(
        self,
        engine: ServingEngine,
        model: str,
        tiers: TierSet,
        router: StreamRouter,
        *,
        tracer: RequestTracer | None = None,
        phase: Callable[[], ServerPhase] = lambda: ServerPhase.SERVING,
        clock: Callable[[], float] = time.monotonic,
        forecasts: Callable[[], Sequence[TierForecast]] | None = None,
    ) -> None:
        """Begins to watch the requests of the router; on the event loop.

        Args:
          engine: as it is, not guarded.
          model: name, as a label.
          tiers: of the server.
          router: whose requests are watched.
          tracer: gets every request; None: no traces.
          phase: of the server, for the dashboard.
          clock: of the records.
          forecasts: asked on the engine's thread what a request of each tier would get; None: nobody knows.
        """
        self.registry = CollectorRegistry()
        self.windows = Windows(tiers)
        self._engine = engine
        self._model = model
        self._tiers = tiers
        self._router = router
        self._tracer = tracer
        self._phase = phase
        self._clock = clock
        self._forecasts = forecasts
        self._requests = RequestMetrics(self.registry, model, tiers)
        self._cell = CellCollector(engine, model, tiers, self.windows, router.open_records, clock)
        self.registry.register(self._cell)
        self._denials = Counter(
            "nitsum_calls_refused",
            "Calls refused because of their caller.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        for reason in REASONS.values():
            self.denied(reason, 0)
        self.layout_log = LayoutLog(SwitchMetrics(self.registry, model, nitsum_jax.__version__))
        self.front = access_checked(engine, self.layout_log, router.stopped, tiers)
        self.feed = Feed(self)
        router.observer = self

    async def look(self) -> None:
        """Asks the engine what it predicts, for the metrics that are about to be read; keeps the old if it is busy."""
        if self._forecasts is None:
            return
        with contextlib.suppress(TimeoutError, NitsumError):
            asked = asyncio.wrap_future(self._engine.ask(self._forecasts))
            self._cell.forecasts = await asyncio.wait_for(asked, _LOOK_S)

    def ended(self, record: ServedRequest) -> None:
        """A request that was accepted has ended."""
        self._requests.ended(record)
        self._cell.ended(record)
        self.windows.add(record)
        log_request(record)
        if self._tracer is not None:
            self._tracer.ended(record)

    def refused(self, tier: str, error: NitsumError) -> None:
        """A request was refused on submission."""
        self._requests.refused(tier, error)

    def denied(self, reason: str, calls: int = 1) -> None:
        """Calls were refused because of their caller; `reason` is one of the guard's."""
        self._denials.labels(self._model, reason).inc(calls)

    def snapshot(self) -> DashboardSnapshot:
        """The cell now."""
        stats = self._engine.stats()
        decisions, switches = self._engine.cell_notes() if isinstance(self._engine, ManyCells) else ((), ())
        return DashboardSnapshot(
            time_s=time.time(),
            model=self._model,
            version=nitsum_jax.__version__,
            phase=self._phase().value,
            layout=str(self._engine.layout()),
            devices=tuple(self._engine.device_names),
            instances=tuple(
                InstanceView(load.devices, load.tp, load.role, load.running, load.kv_use)
                for load in self._engine.loads()
            ),
            tiers=self._tier_views(),
            switches=tuple(sorted([*self.layout_log.switches(), *switches], key=lambda one: one.time_s)[-KEPT:]),
            decisions=tuple(sorted([*self.layout_log.decisions(), *decisions], key=lambda one: one.time_s)[-KEPT:]),
            totals=Totals(
                waiting=stats.waiting,
                running=stats.running,
                queue_capacity=stats.queue_capacity,
                kv_use=1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0,
                tokens=stats.tokens_generated,
                steps=stats.steps,
                switches=stats.switches,
                compiles=stats.compiles,
                prefix_share=_prefix_share(stats),
            ),
            compiling=self._engine.compiling(),
            cells=tuple(map(_box, self._engine.cell_views())) if isinstance(self._engine, ManyCells) else (),
        )

    def close(self) -> None:
        """Sends the traces that are left; may take as long as the collector takes."""
        if self._tracer is not None:
            self._tracer.close()

    def _tier_views(self) -> tuple[TierView, ...]:
        alive: Sequence[ServedRequest] = [r for r in self._router.open_records() if r.ended_s is None]
        now = self._clock()
        views = []
        for tier in self._tiers:
            mine = [r for r in alive if r.tier == tier.name]
            running = sum(r.admitted_s is not None or r.first_s is not None for r in mine)
            lately = self.windows.of(tier.name, now)
            views.append(
                TierView(
                    tier.name,
                    tier.ttft_ms / 1e3,
                    tier.tpot_ms / 1e3,
                    len(mine) - running,
                    running,
                    lately.counted,
                    lately.attainment,
                    lately.goodput,
                    lately.ttft_p50,
                    lately.ttft_p99,
                    lately.tpot_p50,
                    lately.tpot_p99,
                )
            )
        return tuple(views)


def _box(view: OneCell) -> CellBox:
    stats = view.stats
    return CellBox(
        view.name,
        view.state,
        view.layout,
        view.devices,
        stats.waiting if stats else 0,
        stats.running if stats else 0,
        1 - stats.blocks_free / stats.blocks_total if stats and stats.blocks_total else 0.0,
        stats.tokens_generated if stats else 0,
        {tier: (met / counted, round(met / WINDOW_S, 4)) for tier, (counted, met) in view.lately.items() if counted},
    )


def _prefix_share(stats: ServingStats) -> float | None:
    asked: int = getattr(stats, "prefix_queried_tokens", 0)  # not every engine has such a cache
    return getattr(stats, "prefix_hit_tokens", 0) / asked if asked else None
