"""The study's page: docs/results/goodput.md and its plots, made of results alone."""

import collections
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nitsum_jax.sim.study.plots import attainment_plot, capacity_plot

Result = Mapping[str, Any]

_WORDS = {
    "adaptive": "adaptive control",
    "static": "best static layout in hindsight",
    "distserve": "static prefill/decode split (DistServe style)",
    "sarathi": "fixed chunks (Sarathi style)",
    "apart": "cell parted between tiers",
    "dynamo": "roles move, TP fixed (Dynamo style)",
    "flying": "all DP or all TP (Flying Serving style)",
}
_GOALS = {
    "steady": ("goodput of adaptive / best static, at the highest rate that the best static layout serves", 0.98),
    "windows": (
        "goodput of adaptive / best layout of every window, with full knowledge and free switches, at the highest rate"
        " that adaptive control serves",
        0.95,
    ),
    "bound": ("goodput of adaptive / union of all layouts, request by request, at that rate", 0.95),
    "capacity": ("capacity of adaptive / best static", None),
    "reach": ("capacity of adaptive / best layout of every window", None),
    "room": ("capacity of the best layout of every window / best static: what choosing layouts could bring", None),
}
_MEANS = ("capacity", "reach", "room")


def write_page(results: Sequence[Result], folder: pathlib.Path, missing: int = 0) -> None:
    """Writes goodput.md and a plot for each result into a folder.

    Args:
      results: of cells, at least one.
      folder: made if need be.
      missing: cells without a result, which the page mentions.
    """
    images = folder / "goodput"
    images.mkdir(parents=True, exist_ok=True)
    capacity_plot(results, images / "capacity.svg")
    for result in results:
        path = folder / plot_path(result)
        path.parent.mkdir(exist_ok=True)
        attainment_plot(result, path)
    (folder / "goodput.md").write_text(page(results, missing), encoding="utf-8")


def plot_path(result: Result) -> str:
    """Where the plot of a result lies, seen from the page: a folder per model, so that none gets long."""
    return f"goodput/{result['name'].replace('_', '/', 1)}.svg"


def page(results: Sequence[Result], missing: int = 0) -> str:
    """The text of the page."""
    sources = sorted({result["source"] for result in results})
    lines = [
        "# What adaptive tensor parallelism is worth",
        "",
        "How much more load a cell serves when it changes its layout by itself, compared with static layouts and other",
        "policies, and with the best that choosing layouts could do. The page is written by `make study`; every figure",
        "comes from simulated runs of a cell of 8 devices, with step times from the profiles named. The policies, the",
        "searches and the bound are described in [simulator.md](../simulator/simulator.md).",
        "",
        "Settings of adaptive control are the same everywhere. The settings of every baseline are searched on the very",
        "workload that it is measured on, which adaptive control does not know beforehand.",
        "",
        f"Workloads: {'; '.join(sources)}.",
    ]
    if missing:
        lines += ["", f"**{missing} cells of the study's config have not been run yet** and are not on this page."]
    lines += ["", "## In short", "", *_short(results), "", "![capacities](goodput/capacity.svg)", ""]
    lines += ["## Capacity", "", "Requests per second at which 90 % meet both targets (bisection on the rate).", ""]
    lines += _capacities(results)
    lines += ["", "## Goodput", ""]
    for result in results:
        lines += _cell(result)
    lines += ["## Ablations", "", *_ablations(results), "", "## What limits it", "", *_limits(results), ""]
    return "\n".join(lines)


def ratios(results: Iterable[Result]) -> dict[str, list[tuple[str, float]]]:
    """The figures that goals are set for: for each goal the cells' names and their ratios."""
    found: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
    for result in results:
        families, name = result["families"], result["name"]
        adaptive, static = families["adaptive"], families["static"]
        if result["shifting"]:
            if static["capacity"] > 0:
                found["capacity"].append((name, adaptive["capacity"] / static["capacity"]))
            bound = result["bound"]
            found["bound"].append((name, bound["adaptive"] / max(1e-9, bound["goodput"])))
            found["windows"].append((name, bound["adaptive"] / max(1e-9, bound["best_goodput"])))
            if bound.get("best_capacity"):
                found["reach"].append((name, adaptive["capacity"] / bound["best_capacity"]))
                if static["capacity"] > 0:
                    found["room"].append((name, bound["best_capacity"] / static["capacity"]))
        else:
            level = str(static["level"])
            if level in adaptive["at"] and level in static["at"]:
                found["steady"].append((name, adaptive["at"][level]["goodput"] / static["at"][level]["goodput"]))
    return found


def _short(results: Sequence[Result]) -> list[str]:
    found = ratios(results)
    lines = ["| what | goal | found | worst | best |", "|---|---|---|---|---|"]
    for goal, (words, target) in _GOALS.items():
        cells = found.get(goal, [])
        wanted = "" if target is None else f"{target}"
        if not cells:
            lines.append(f"| {words} | {wanted} | not measured | | |")
            continue
        worst, best = min(cells, key=lambda cell: cell[1]), max(cells, key=lambda cell: cell[1])
        mean = math.exp(sum(math.log(max(1e-9, value)) for _, value in cells) / len(cells))
        value, kind = worst[1], "worst case"
        if goal in _MEANS:
            value, kind = mean, "geometric mean"
        lines.append(
            f"| {words} | {wanted} | **{value:.3f}** ({kind}) | {worst[1]:.3f} {worst[0]} | {best[1]:.3f} {best[0]} |"
        )
    mixes = {result["name"]: result["mix"] for result in results}
    means = []
    for mix in dict.fromkeys(mixes[name] for name, _ in found.get("capacity", [])):
        logs = [math.log(max(1e-9, value)) for name, value in found["capacity"] if mixes[name] == mix]
        means.append(f"{mix} {math.exp(sum(logs) / len(logs)):.3f} ({len(logs)} cells)")
    if len(means) > 1:
        lines += ["", f"Capacity of adaptive / best static by mix, geometric means: {', '.join(means)}."]
    return lines


def _capacities(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(family for result in results for family in result["families"]))
    lines = ["| cell | " + " | ".join(names) + " | adaptive / static |", "|---|" + "---|" * (len(names) + 1)]
    for result in results:
        families = result["families"]
        cells = [f"{families[n]['capacity']:.2f}" if n in families else "" for n in names]
        static = families["static"]["capacity"]
        ratio = f"{families['adaptive']['capacity'] / static:.2f}" if static else "-"
        lines.append(f"| {result['name']} | " + " | ".join(cells) + f" | {ratio} |")
    lines += ["", "0.00: even at a tenth of the guessed rate, fewer than 90 % meet both targets."]
    return lines


def _cell(result: Result) -> list[str]:
    targets = ", ".join(f"{tier} {ttft:g} / {tpot:g}" for tier, (ttft, tpot) in result["targets"].items())
    lines = [
        f"### {result['model']}, {result['device']}: {result['mix']}",
        "",
        f"Profile {result['profile']}; targets TTFT / TPOT in ms: {targets}; {result['seconds']:.0f} s of requests.",
        "",
        f"![attainment]({plot_path(result)})",
        "",
    ]
    levels = list(result["levels"])
    head = " | ".join(f"goodput at {result['levels'][level]:.1f}/s | attainment" for level in levels)
    lines += [f"| policy | {head} | settings |", "|---|" + "---|---|" * len(levels) + "---|"]
    for family, row in result["families"].items():
        cells = []
        for level in levels:
            at = row["at"].get(level)
            if at is None:
                cells += ["", ""]
            elif at["given_up"]:
                cells += ["-", "< 50 %"]
            else:
                cells += [f"{at['goodput']:.2f}", f"{at['attainment']:.1%}"]
        lines.append(f"| {_WORDS.get(family, family)} | " + " | ".join(cells) + f" | `{row['policy']}` |")
    bound = result["bound"]
    lines += [
        "",
        f"Upper bound at {bound['rate']:.1f}/s: goodput {bound['goodput']:.2f}, attainment {bound['attainment']:.1%},"
        f" over {bound['candidates']} candidate layouts; the best one of every window: {bound['best_goodput']:.2f},"
        f" {bound['best_attainment']:.1%}; adaptive control reaches {bound['adaptive']:.2f}"
        f" ({bound['adaptive'] / max(1e-9, bound['goodput']):.1%} and"
        f" {bound['adaptive'] / max(1e-9, bound['best_goodput']):.1%}).{_reach(result)}",
        "",
    ]
    adaptive = list(result["families"]["adaptive"]["at"].values())
    if adaptive:
        switches = ", ".join(f"{row['switches']} ({row['stall_s'] * 1000:.0f} ms)" for row in adaptive)
        lines += [f"Switches of adaptive control at these rates, and their stalls together: {switches}.", ""]
    return lines


def _ablations(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(name for result in results for name in result["ablations"]))
    lines = [
        "Goodput of adaptive control without one of its abilities, as a share of its goodput with all of them, at the"
        " highest rate that it serves with all of them.",
        "[simulator.md](../simulator/simulator.md#baselines) describes the ablations.",
        "",
        "| cell | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for result in results:
        at = result["families"]["adaptive"]["at"].get(str(result["families"]["adaptive"]["level"]))
        cells = []
        for name in names:
            row = result["ablations"].get(name)
            whole = at["goodput"] if at else 0.0
            cells.append("" if row is None or not whole else _share(row, whole))
        lines.append(f"| {result['name']} | " + " | ".join(cells) + " |")
    return lines


def _share(row: Mapping[str, Any], whole: float) -> str:
    return f"< {row['goodput'] / whole:.0%}" if row["given_up"] else f"{row['goodput'] / whole:.1%}"


def _limits(results: Sequence[Result]) -> list[str]:
    """Where goals are missed, with what the figures say about why."""
    found = ratios(results)
    by_name = {result["name"]: result for result in results}
    lines = []
    for goal in ("steady", "windows", "bound"):
        words, target = _GOALS[goal]
        for name, value in found.get(goal, []):
            if target is None or value >= target:
                continue
            result = by_name[name]
            lines.append(f"- {name}: {words} is {value:.3f}, below {target}. {_why(result)}")
    return lines or ["No goal is missed in any cell."]


def _reach(result: Result) -> str:
    capacity, static = result["bound"].get("best_capacity"), result["families"]["static"]["capacity"]
    if not capacity or not static:
        return ""
    return (
        f" The best layout of every window, with full knowledge and free switches, serves {capacity:.2f}/s:"
        f" {capacity / static:.2f} times the best static one is all that choosing layouts can bring."
    )


def _why(result: Result) -> str:
    families = result["families"]
    level = str(families["adaptive"]["level"])
    row = families["adaptive"]["at"].get(level)
    if row is None:
        return ""
    tiers = ", ".join(f"{tier} {share:.1%}" for tier, share in row["tiers"].items())
    return f"At {row['rate']:.2f}/s its attainment is {tiers}, with {row['switches']} switches."
