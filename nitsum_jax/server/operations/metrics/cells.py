"""Metrics of each of several cells, with its name as a label; sums over them have the names of one server."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nitsum_jax.runtime.backend import OneCell, ServingStats

_LABELS = ("model_name", "cell")
_GAUGES: Final[tuple[tuple[str, str, Callable[[ServingStats], float]], ...]] = (
    ("running_requests", "Requests that an instance of the cell works on.", lambda stats: stats.running),
    ("queued_requests", "Requests that no instance of the cell has taken.", lambda stats: stats.waiting),
    (
        "kv_cache_usage_perc",
        "KV blocks of the cell in use, 0 to 1.",
        lambda stats: 1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0,
    ),
)


def each_cell(model: str, views: Sequence[OneCell]) -> Iterator[Metric]:
    """All families, with the values of now.

    Args:
      model: value of the label model_name.
      views: of the cells that there are.
    """
    info = GaugeMetricFamily(
        "nitsum_cell_info", "A cell, its state and its layout; always 1.", labels=(*_LABELS, "state", "layout")
    )
    for view in views:
        info.add_metric((model, view.name, view.state, view.layout), 1)
    yield info
    known = [(view.name, view.stats) for view in views if view.stats is not None]
    for name, what, value in _GAUGES:
        gauge = GaugeMetricFamily(f"nitsum_cell_{name}", what, labels=_LABELS)
        for cell, stats in known:
            gauge.add_metric((model, cell), value(stats))
        yield gauge
    tokens = CounterMetricFamily("nitsum_cell_generation_tokens", "Output tokens of the cell.", labels=_LABELS)
    for cell, stats in known:
        tokens.add_metric((model, cell), stats.tokens_generated)
    yield tokens
    attainment = GaugeMetricFamily(
        "nitsum_cell_attainment_ratio",
        "Share of the requests that ended in the cell in the last minute that met both targets.",
        labels=(*_LABELS, "tier"),
    )
    for view in views:
        for tier, (counted, met) in sorted(view.lately.items()):
            if counted:
                attainment.add_metric((model, view.name, tier), met / counted)
    yield attainment
