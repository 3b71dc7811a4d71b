"""Figures of several runs: how the share of met targets falls with the rate, policy by policy."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nitsum_jax.sim.report import style
from nitsum_jax.sim.report.runs import ReportedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AIM = 0.9
_MARKERS = "osD^vPX*<>"


def capacity(rates: Sequence[float], attainments: Sequence[float], aim: float = AIM) -> float | None:
    """The rate at which attainment first falls below the aim, on straight lines between the points.

    Args:
      rates: requests per second, ascending.
      attainments: at each.
      aim: share of requests.

    Returns:
      The rate; None where it is below the aim from the first point on, or never falls below it.
    """
    points = list(zip(rates, attainments, strict=True))
    for (r0, a0), (r1, a1) in itertools.pairwise(points):
        if a0 >= aim > a1:
            return r0 + (r1 - r0) * (a0 - aim) / (a0 - a1)
    return None


def by_setting(runs: Sequence[ReportedRun]) -> dict[str, list[ReportedRun]]:
    """Runs that may be compared with each other."""
    found: dict[str, list[ReportedRun]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return found


def comparable(runs: Sequence[ReportedRun]) -> bool:
    """Whether there is anything to compare."""
    return any(len({(r.policy, r.rate) for r in group}) > 1 for group in by_setting(runs).values())


def over_rates(group: Sequence[ReportedRun]) -> bool:
    """Whether some policy of these comparable runs was run at more than one rate."""
    policies = {r.policy for r in group}
    return len({(r.policy, r.rate) for r in group}) > len(policies)


def attainment_by_rate(runs: Sequence[ReportedRun]) -> "Figure":
    """A panel for each setting: lines over the rate, or bars where all runs have one rate."""
    groups = {name: group for name, group in by_setting(runs).items() if comparable(group)}
    policies = list(dict.fromkeys(r.policy for group in groups.values() for r in group))
    colours = style.name_colours(policies)
    heights = []
    for group in groups.values():
        policies_here = len({r.policy for r in group})
        heights.append(max(3.4, 0.26 * policies_here + 0.9) if over_rates(group) else 0.34 * len(group) + 1.0)
    figure = style.new_figure(10.5, sum(heights))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        if over_rates(group):
            _lines(axes, group, colours)
        else:
            _bars(axes, group, colours)
        axes.set_title(name)
    return figure


def _lines(axes: "Axes", group: Sequence[ReportedRun], colours: dict[str, str]) -> None:
    axes.axhline(AIM, color=style.MUTED, linestyle=(0, (2, 3)), linewidth=1)
    curves = []
    for policy in dict.fromkeys(r.policy for r in group):
        mine = sorted((r.rate, r.attainment) for r in group if r.policy == policy)
        # Runs of one policy at one rate (other seeds, say) count as their mean.
        rates = [rate for rate, _ in itertools.groupby(mine, key=lambda pair: pair[0])]
        means = [float(np.mean([a for r, a in mine if r == rate])) for rate in rates]
        curves.append((capacity(rates, means), policy, rates, means))
    # The legend in the order of what a reader wants to know.
    curves.sort(key=lambda c: (-(c[0] if c[0] is not None else np.inf * (1 if c[3][0] >= AIM else -1)), c[1]))
    for i, (found, policy, rates, means) in enumerate(curves):
        if found is not None:
            note = f"{found:.3g}/s"
        else:
            note = f"above {rates[-1]:.3g}/s" if means[0] >= AIM else f"below {rates[0]:.3g}/s"
        own = policy == "adaptive"
        axes.plot(
            rates,
            means,
            color=style.ACCENT if own else colours[policy],
            linewidth=2.6 if own else 1.3,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4.5 if own else 3.5,
            zorder=4 if own else 3,
            label=f"{policy}: {note}",
        )
    style.percent_axis(axes)
    axes.set_xlabel("requests per second that came")
    axes.set_ylabel("attainment")
    title = f"capacity at {AIM:.0%} attainment"
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), alignment="left")


def _bars(axes: "Axes", group: Sequence[ReportedRun], colours: dict[str, str]) -> None:
    rows = sorted(group, key=lambda r: r.attainment)
    labels = [f"{r.policy} ({r.rate:.3g}/s)" for r in rows]
    shown = [style.ACCENT if r.policy == "adaptive" else colours[r.policy] for r in rows]
    bars = axes.barh(range(len(rows)), [r.attainment for r in rows], color=shown, height=0.62)
    axes.bar_label(bars, [f"{r.attainment:.1%}" for r in rows], padding=4, fontsize=8.5)
    axes.axvline(AIM, color=style.MUTED, linestyle=(0, (2, 3)), linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_xlabel("attainment")
    axes.grid(False)
