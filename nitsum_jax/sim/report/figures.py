"""Figures of one run: what happened over time, and how long requests took."""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nitsum_jax.sim.report import style
from nitsum_jax.sim.report.runs import ReportedRun
from nitsum_jax.sim.report.spans import Span, nice_interval, spans_of
from nitsum_jax.sim.runs.logs import RunLogs
from nitsum_jax.sim.runs.metrics import over_time
from nitsum_jax.sim.runs.tables import RequestTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVE = 400  # points of a distribution
_MANY = 3000  # rectangles above which the timeline becomes a picture
_Floats = npt.NDArray[np.float64]


def timeline(run: ReportedRun, logs: RunLogs) -> "Figure":
    """Load and goodput, attainment, layout and utilisation of a run over the same time."""
    seconds = run.seconds
    interval = nice_interval(seconds, run.rate)
    edges = np.append(np.arange(0, seconds, interval), seconds)
    if len(edges) > 2 and edges[-1] - edges[-2] < interval / 2:  # a stump would only be noise
        edges = np.delete(edges, -2)
    unit, name = (60.0, "minutes") if seconds > 300 else (1.0, "seconds")
    devices = int(run.summary.get("devices") or 1 + max((d for g in logs.steps.groups for d in g), default=0))
    rows = [1.5, 1.2, 0.6 + min(2.8, 0.18 * devices)]
    if len(logs.steps):  # not every run keeps them
        rows.append(0.8)
    figure = style.new_figure(10.5, 1.5 * sum(rows) + 0.4)
    panels = figure.subplots(len(rows), 1, sharex=True, height_ratios=rows)
    load, attained, layout = panels[:3]
    _load(load, run, logs, edges, unit)
    _attainment(attained, run, logs, edges, unit)
    _layout(layout, spans_of(logs, seconds), [s.time_s / unit for s in logs.switches], devices, unit, seconds)
    if len(logs.steps):
        _utilisation(panels[3], logs, edges, devices, unit)
    panels[-1].set_xlabel(name)
    panels[-1].set_xlim(0, seconds / unit)
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
    figure.align_ylabels()
    return figure


def latencies(run: ReportedRun, requests: RequestTable) -> "Figure":
    """Distributions of TTFT and TPOT of each tier, with the targets."""
    figure = style.new_figure(10.5, 3.7)
    colours = style.name_colours(run.tiers.names)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, target, title in (
        (left, requests.ttft_s * 1000, "ttft_ms", "Time to first token"),
        (right, requests.tpot_s * 1000, "tpot_ms", "Time per output token"),
    ):
        shown = []
        for tier in run.tiers:
            limit = float(getattr(tier, target))
            colour = colours[tier.name]
            mine = values[requests.of_tier(tier.name)]
            mine = np.sort(mine[~np.isnan(mine)])
            axes.axvline(limit, color=colour, linestyle=(0, (4, 3)), linewidth=1.1)
            shown.append(limit)
            if not len(mine):
                continue
            share = float(np.searchsorted(mine, limit * (1 + 1e-9), side="right")) / len(mine)
            axes.plot(*_curve(mine), color=colour, label=f"{tier.name}: {_short(share)} within {_ms(limit)}")
            axes.plot([limit], [share], "o", color=colour, markersize=5, markeredgecolor="white", zorder=4)
            shown += [float(np.quantile(mine, 0.005)), float(mine[-1])]
        axes.set_xscale("log")
        low, high = max(min(shown), max(shown) * 1e-5, 1e-3), max(shown)
        axes.set_xlim(low / 1.25, high * 1.5)
        axes.xaxis.set_major_formatter(lambda x, _: _ms(x))
        axes.xaxis.set_minor_formatter(lambda x, _: "")
        axes.grid(True, axis="x", which="major")
        axes.set_title(title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=1)
    style.percent_axis(left)
    left.set_ylabel("share of requests")
    return figure


def _load(axes: "Axes", run: ReportedRun, logs: RunLogs, edges: _Floats, unit: float) -> None:
    """What came, stacked by tier, and what met its targets."""
    widths = np.diff(edges)
    colours = style.name_colours(run.tiers.names)
    below = np.zeros(len(widths))
    for tier in run.tiers:
        came, _ = np.histogram(logs.requests.arrival_s[logs.requests.of_tier(tier.name)], edges)
        top = below + came / widths
        label = f"{tier.name}, came"
        axes.stairs(top, edges / unit, baseline=below, fill=True, color=colours[tier.name], alpha=0.3, label=label)
        below = top
    _, good = over_time(logs.requests, run.tiers, edges)
    axes.stairs(good / widths, edges / unit, baseline=None, color=style.INK, linewidth=1.5, label="met both targets")
    axes.set_ylim(0, max(float(below.max()) * 1.08, 1e-9))
    axes.set_ylabel("requests/s")
    axes.set_title("Load and goodput, by time of arrival")
    _legend(axes, len(run.tiers) + 1)


def _attainment(axes: "Axes", run: ReportedRun, logs: RunLogs, edges: _Floats, unit: float) -> None:
    middles = (edges[1:] + edges[:-1]) / 2 / unit
    met = logs.requests.recomputed_met(run.tiers)
    axes.axhline(0.9, color=style.MUTED, linestyle=(0, (2, 3)), linewidth=1)
    for name, colour in style.name_colours(run.tiers.names).items():
        mine = logs.requests.of_tier(name)
        came, _ = np.histogram(logs.requests.arrival_s[mine], edges)
        good, _ = np.histogram(logs.requests.arrival_s[mine & met], edges)
        share = np.where(came > 0, good / np.maximum(came, 1), np.nan)
        axes.plot(middles, share, color=colour, label=name, marker="o" if len(share) < 30 else "", markersize=3)
    style.percent_axis(axes)
    axes.set_title("Attainment")
    _legend(axes, len(run.tiers))


def _utilisation(axes: "Axes", logs: RunLogs, edges: _Floats, devices: int, unit: float) -> None:
    share = logs.steps.busy_device_s(edges) / (np.diff(edges) * devices)
    axes.stairs(share, edges / unit, fill=True, color="#b9c4ce")
    axes.stairs(share, edges / unit, baseline=None, color=style.MUTED, linewidth=1)
    style.percent_axis(axes)
    axes.set_yticks([0, 0.5, 1], ["0", "50", "100 %"])
    axes.set_title("Device time spent in steps")


def _layout(axes: "Axes", spans: list[Span], switches: list[float], devices: int, unit: float, seconds: float) -> None:
    """One bar per instance, as high as it has devices."""
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    bars = [(span, first, count) for span in spans if span.start_s < seconds for first, count in span.runs()]
    inset = 0.06
    kinds: dict[tuple[int, str], list[list[tuple[float, float]]]] = {}
    for span, first, count in bars:
        start, end = span.start_s / unit, min(span.end_s, seconds) / unit
        low, high = first - 0.5 + inset, first + count - 0.5 - inset
        corners = [(start, low), (end, low), (end, high), (start, high)]
        kinds.setdefault((span.tp, span.role), []).append(corners)
        # Only where there is room for it.
        if end - start > 0.07 * seconds / unit and devices <= 32:
            colour = style.tp_colour(span.tp)
            axes.text(
                (start + end) / 2,
                (low + high) / 2,
                f"TP{span.tp}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if span.tp >= 8 else style.INK,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"},
            )
    for (tp, role), corners_of in kinds.items():
        patches = PolyCollection(corners_of, facecolor=style.tp_colour(tp), edgecolor="white", linewidth=0.5)
        patches.set_hatch(style.hatch(role) if len(bars) <= _MANY else "")
        patches.set_rasterized(len(bars) > _MANY)
        axes.add_collection(patches, autolim=False)
    if switches:
        label = f"{len(switches)} switch{'es' if len(switches) > 1 else ''}"
        height = [devices - 0.32] * len(switches)
        axes.plot(switches, height, "v", color=style.ACCENT, markersize=4, clip_on=False, label=label)
    axes.set_ylim(-0.6, devices - 0.4)
    step = max(1, devices // 8)
    axes.set_yticks(range(0, devices, step))
    axes.set_ylabel("device")
    axes.grid(False)
    axes.set_title("Layout")
    tps = sorted({span.tp for span in spans})
    roles = [role for role in ("prefill", "decode") if any(span.role == role for span in spans)]
    handles: list = [Patch(facecolor=style.tp_colour(tp), edgecolor="none", label=f"TP{tp}") for tp in tps]
    handles += [Patch(facecolor="#9aa5b1", edgecolor="white", hatch=style.hatch(r), label=r) for r in roles]
    handles += axes.get_legend_handles_labels()[0]
    if handles:
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles), borderaxespad=0.1)


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=columns, borderaxespad=0.1)


def _curve(ordered: _Floats) -> tuple[_Floats, _Floats]:
    """Points of the distribution of sorted values, few enough to draw; the ends are exact."""
    # Denser towards both ends, where the tails are.
    share = (1 - np.cos(np.linspace(0, np.pi, min(_CURVE, 4 * len(ordered))))) / 2
    index = np.minimum((share * len(ordered)).astype(np.int64), len(ordered) - 1)
    x = np.maximum(ordered[index], 1e-6)
    return np.concatenate([x[:1], x]), np.concatenate([[0.0], (index + 1) / len(ordered)])


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:g} s"
    return f"{value:g} ms"


def _short(share: float) -> str:
    """In per cent; what is not all does not look like all."""
    return "100 %" if share == 1 else f"{min(share * 100, 99.9):.3g} %"
