"""Metrics of the cell: what is read from the engine at each scrape, and what switches and decisions did."""

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.runtime.backend import ManyCells, ServingEngine, ServingStats
from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.server.operations.metrics import buckets
from nitsum_jax.server.operations.metrics.cells import each_cell
from nitsum_jax.server.operations.metrics.window import Windows

_FROM_STATS: Final = (
    # metric, attribute of the engine's stats, meaning; an engine that does not count a thing does not show it.
    ("engine_steps", "steps", "Steps of all instances."),
    ("layout_switches", "switches", "Switches of the layout."),
    ("compiles", "compiles", "XLA compilations of this process; after warm-up this must not grow."),
    ("num_preemptions", "sent_back", "Sequences that lost their blocks and were computed anew."),
    ("broken_logits", "broken_logits", "Requests that failed because the model produced NaN or infinite logits."),
    ("wide_prefills", "wide_prefills", "Prompts prefilled at the widest TP in between the steps of others."),
    ("prefix_cache_queries", "prefix_queried_tokens", "Prompt tokens that were looked up in the prefix cache."),
    ("pace_late_steps", "pace_late_steps", "Steps of a paced cell that came later than their pace; see engine_steps."),
    ("prefix_cache_hits", "prefix_hit_tokens", "Prompt tokens that were found there."),
)


class CellCollector(Collector):
    """Reads engine, open requests and windows when the metrics are asked for: it costs the requests nothing.

    Call it on the event loop, which owns what it reads.
    """

    def __init__(
        self,
        engine: ServingEngine,
        model: str,
        tiers: TierSet,
        windows: Windows,
        open_records: Callable[[], list[ServedRequest]],
        clock: Callable[[], float],
    ) -> None:
        """Reads nothing yet.

        Args:
          engine: whose state is shown.
          model: value of the label model_name.
          tiers: values of the label tier.
          windows: what happened lately.
          open_records: requests that are alive.
          clock: of the records.
        """
        self._engine = engine
        self._model = model
        self._tiers = tiers
        self._windows = windows
        self._open_records = open_records
        self._clock = clock
        self._ended_tokens: Tally[str] = Tally()
        self.forecasts: Sequence[TierForecast] = ()

    def ended(self, record: ServedRequest) -> None:
        """Keeps the tokens of a request that is open no more."""
        self._ended_tokens[record.tier] += record.tokens

    def describe(self) -> list[Metric]:
        """Nothing: else registering would ask the engine for all of it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, with the values of now."""
        yield from self._requests()
        yield from self._lately()
        yield from self._predicted()
        yield from self._cell()
        if isinstance(self._engine, ManyCells):
            yield from each_cell(self._model, self._engine.cell_views())

    def _requests(self) -> Iterator[Metric]:
        waiting: Tally[str] = Tally()
        running: Tally[str] = Tally()
        tokens = Tally(self._ended_tokens)
        for record in self._open_records():
            tokens[record.tier] += record.tokens
            if record.ended_s is None:
                begun = record.admitted_s is not None or record.first_s is not None
                (running if begun else waiting)[record.tier] += 1
        labels = ("model_name", "tier")
        for name, what, values in (
            ("num_requests_running", "Requests that an instance works on.", running),
            ("num_requests_waiting", "Requests that no instance has taken.", waiting),
        ):
            family = GaugeMetricFamily(f"nitsum_{name}", what, labels=labels)
            for tier in self._tiers.names:
                family.add_metric((self._model, tier), values[tier])
            yield family
        generated = CounterMetricFamily("nitsum_generation_tokens", "Output tokens.", labels=labels)
        for tier in self._tiers.names:
            generated.add_metric((self._model, tier), tokens[tier])
        yield generated

    def _lately(self) -> Iterator[Metric]:
        labels = ("model_name", "tier")
        attainment = GaugeMetricFamily(
            "nitsum_attainment_ratio", "Share of the last minute's requests that met both targets.", labels=labels
        )
        goodput = GaugeMetricFamily(
            "nitsum_goodput_requests_per_second", "Requests of the last minute that met both targets.", labels=labels
        )
        target = GaugeMetricFamily("nitsum_tier_target_seconds", "Targets.", labels=("model_name", "tier", "target"))
        for tier in self._tiers:
            lately = self._windows.of(tier.name, self._clock())
            if lately.attainment is not None:
                attainment.add_metric((self._model, tier.name), lately.attainment)
            goodput.add_metric((self._model, tier.name), lately.goodput)
            target.add_metric((self._model, tier.name, "ttft"), tier.ttft_ms / 1e3)
            target.add_metric((self._model, tier.name, "tpot"), tier.tpot_ms / 1e3)
        yield from (attainment, goodput, target)

    def _predicted(self) -> Iterator[Metric]:
        labels = ("model_name", "tier")
        ttft = GaugeMetricFamily(
            "nitsum_predicted_ttft_seconds",
            "Time to the first token that a usual request of the tier would get if it came now.",
            labels=labels,
        )
        tpot = GaugeMetricFamily(
            "nitsum_predicted_tpot_seconds", "Time per output token that it would get.", labels=labels
        )
        for forecast in self.forecasts:
            ttft.add_metric((self._model, forecast.tier), forecast.ttft_s)
            tpot.add_metric((self._model, forecast.tier), forecast.tpot_s)
        yield from (ttft, tpot)

    def _for_gateways(self, stats: ServingStats) -> Iterator[Metric]:
        """What an endpoint picker reads: one series each, of all tiers together."""
        for name, what, value in (
            ("total_queued_requests", "Requests that no instance has taken, of all tiers.", stats.waiting),
            ("total_running_requests", "Requests that an instance works on, of all tiers.", stats.running),
        ):
            family = GaugeMetricFamily(f"nitsum_{name}", what, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family
        size = getattr(stats, "page_size", 0)
        if size:
            config = GaugeMetricFamily(
                "nitsum_cache_config_info",
                "Tokens of a KV block, and how many blocks of a whole page there are; always 1.",
                labels=("model_name", "block_size", "num_gpu_blocks"),
            )
            config.add_metric((self._model, str(size), str(getattr(stats, "pages_total", 0))), 1)
            yield config

    def _cell(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield from self._for_gateways(stats)
        used = GaugeMetricFamily("nitsum_kv_cache_usage_perc", "KV blocks in use, 0 to 1.", labels=("model_name",))
        used.add_metric((self._model,), 1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0)
        yield used
        for name, attribute, what in _FROM_STATS:
            value = getattr(stats, attribute, None)
            if value is not None:
                family = CounterMetricFamily(f"nitsum_{name}", what, labels=("model_name",))
                family.add_metric((self._model,), value)
                yield family
        layout = self._engine.layout()
        info = GaugeMetricFamily(
            "nitsum_layout_info", "The layout in force; always 1.", labels=("model_name", "layout")
        )
        info.add_metric((self._model, str(layout)), 1)
        instances = GaugeMetricFamily(
            "nitsum_instances", "Instances by TP and role.", labels=("model_name", "tp", "role")
        )
        for (tp, role), count in Tally((i.tp, str(i.role)) for i in layout.instances).items():
            instances.add_metric((self._model, str(tp), role), count)
        yield from (info, instances)
        compiling = self._engine.compiling()
        for name, what, count in (
            ("executables_compiling", "Executables that are being compiled or loaded.", len(compiling.making)),
            ("executables_queued", "Executables that are yet to be compiled.", compiling.queued),
            ("layouts_pending", "Layouts for which a switch or a caller waits.", len(compiling.layouts)),
        ):
            gauge = GaugeMetricFamily(f"nitsum_{name}", what, labels=("model_name",))
            gauge.add_metric((self._model,), count)
            yield gauge


class SwitchMetrics:
    """What switches and decisions did; observes a `LayoutLog`, on any thread."""

    def __init__(self, registry: CollectorRegistry, model: str, version: str) -> None:
        """Registers the metrics.

        Args:
          registry: takes them.
          model: value of the label model_name.
          version: of this package, for nitsum_build_info.
        """
        label = ("model_name",)
        Info("nitsum_build", "What runs.", registry=registry).info({"version": version})
        self._stall = Histogram(
            "nitsum_switch_stall_seconds",
            "Time in which sequences produced no token because of a switch.",
            label,
            registry=registry,
            buckets=buckets.STALL_S,
        ).labels(model)
        moved = Counter(
            "nitsum_bytes_moved", "Bytes that switches moved between devices.", (*label, "kind"), registry=registry
        )
        self._kv, self._weights = moved.labels(model, "kv"), moved.labels(model, "weights")
        self._sequences = Counter(
            "nitsum_switch_sequences", "Live sequences that switches moved.", label, registry=registry
        ).labels(model)
        self._failed = Counter("nitsum_switch_failures", "Switches that failed.", label, registry=registry).labels(
            model
        )
        self._plan = Histogram(
            "nitsum_plan_seconds",
            "Time to choose a layout.",
            label,
            registry=registry,
            buckets=buckets.PLAN_S,
        ).labels(model)
        self._decisions = Counter(
            "nitsum_layout_decisions", "Choices of a layout, also of the same one.", label, registry=registry
        ).labels(model)

    def decided(self, decision: LayoutChoice) -> None:
        """Counts a decision."""
        self._decisions.inc()
        if decision.plan_s is not None:
            self._plan.observe(decision.plan_s)

    def switched(self, note: SwitchNote) -> None:
        """Observes a switch."""
        if note.error is not None:
            self._failed.inc()
            return
        self._stall.observe(note.stall_s)
        self._kv.inc(note.kv_bytes)
        self._weights.inc(note.weight_bytes)
        self._sequences.inc(note.sequences)
