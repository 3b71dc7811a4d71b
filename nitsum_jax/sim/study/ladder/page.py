"""The ladder's page: docs/results/ladder.md and its plots, made of results alone."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nitsum_jax.sim.study.ladder.fit import capacity
from nitsum_jax.sim.study.ladder.plot import ladder_plot, title
from nitsum_jax.sim.study.ladder.rungs import DEPLOYED, STATIC

Result = Mapping[str, Any]

WORDS = {
    "vanilla": "vanilla FCFS: a queue for each replica",
    "vanilla-timeouts": "the same, clients leave after their TTFT target",
    "least-loaded": "one queue, least loaded replica (Llumnix style)",
    "split": "prefill and decode apart, FCFS (DistServe style)",
    "chiron": "instances for tight and relaxed tiers, batches by TPOT (Chiron style)",
    "apart": "tiers apart, FCFS",
    "dynamo": "roles move by load, FCFS (Dynamo style)",
    "flying": "all DP or all TP by load, FCFS (Flying Serving style)",
    "ours-static-tp": "our scheduler, best static TP",
    "ours-apart": "our scheduler, tiers apart",
    "ours-static-mixed": "our scheduler, best static layout",
    "ours-adaptive": "our scheduler, adaptive layout",
    "ours-device-put": "the same with slow switches (`device_put`)",
}
_TRIED = """\
These were tried in earlier versions of the planner, on cells of the [quick study](goodput.md), and are not built in:

| what | gain |
|---|---|
| prefill over all devices at once, as a layout of the planner | 2 to 3 points of attainment less |
| several TPs on the same devices, taking turns in time | at most 7 % of goodput, if turns were free |
| decisions every second instead of every five | 0 +- 1 point |
| switches that cost nothing | 0 +- 1 point |
| a planner that knows the requests that will come | 0 +- 1 point |
"""
_SEED = """\
The authors of the paper that this project follows (Nitsum) report for a 14B model on 8 H100 at 70 requests/s: plain
SGLang 13.2 requests/s within both targets, best static TP with their SLO scheduler 16.7, tiers apart 17.2, their SLO
scheduler 28.0, dynamic TP on top 33.3. Their workload and targets are not public in detail, so only the order of the
steps can be compared: most of the gain is the scheduler's, and changing layouts adds a fifth.
"""


def write_page(results: Sequence[Result], folder: pathlib.Path, missing: Sequence[str] = ()) -> None:
    """Writes ladder.md and a plot for each result into a folder.

    Args:
      results: of cells, at least one.
      folder: made if need be.
      missing: names of cells that were not run, which the page mentions.
    """
    images = folder / "ladder"
    images.mkdir(parents=True, exist_ok=True)
    for result in results:
        ladder_plot(result, images / f"{result['name']}.svg")
    (folder / "ladder.md").write_text(page(results, missing), encoding="utf-8")


def page(results: Sequence[Result], missing: Sequence[str] = ()) -> str:
    """The text of the page."""
    lines = [
        "# What can be deployed today, and what this project adds",
        "",
        "Goodput (requests a second that meet both targets) from half to four times about the load that our scheduler",
        "serves with one static TP: first what others deploy, then this project's parts one after the other. What each",
        "serves with an attainment of 90 % is the last column of the tables. Simulated, with the step times of the",
        "profiles named. `make ladder` writes this page ([how](../simulator/simulator.md#the-ladder)).",
        "",
        "The settings of every rung (TP, roles, chunk, batch limit, limits of its controller, placement of tiers) are",
        "searched on a sample of the very workload, at one and at two times the load; of those found, each load counts",
        "the best. Adaptive control has no settings and does not know the workload. Every figure is the mean over the",
        "seeds, which begin at different places of the traces, with the least and the largest in brackets.",
        "",
        "Of what is deployed only vanilla replicas were also run with timeouts. The other queues grow for as long as",
        "an overload lasts, so their rows fall with the length of the run: far into overload compare with the row that",
        "has timeouts. It is among those that ratios are taken over; every ratio names its row.",
        "",
        f"Workloads: {'; '.join(sorted({result['source'] for result in results}))}.",
    ]
    if missing:
        lines += ["", f"Cells of the config that were not run: {', '.join(missing)}."]
    lines += ["", "## In short", "", *_short(results), ""]
    for result in results:
        lines += _cell(result)
    lines += ["## The authors' own ladder", "", _SEED, "## What was tried and does not pay", "", _TRIED]
    return "\n".join(lines)


def mean(row: Mapping[str, Any], key: str = "goodput") -> float:
    """Mean of a figure over the seeds."""
    return sum(seed[key] for seed in row["seeds"]) / len(row["seeds"])


def best(result: Result, rungs: Sequence[str], i: int) -> tuple[str, float]:
    """The best of some rungs, of those that were run, at the i-th load: name and goodput."""
    ran = result["rungs"]
    return max(((rung, mean(ran[rung][i])) for rung in rungs if rung in ran), key=lambda pair: pair[1])


def _words(result: Result) -> list[tuple[str, str]]:
    """Rungs that were run, and what they are in words."""
    return [(rung, words) for rung, words in WORDS.items() if rung in result["rungs"]]


def _left_out(result: Result) -> str:
    """What was not run, and what a reader must know of the runs."""
    missing = [f"`{rung}`" for rung in WORDS if rung not in result["rungs"]]
    note = f" {result['note']}" if result.get("note") else ""
    return f"{note} Not run: {', '.join(missing)}." if missing else note


def _loads(result: Result) -> list[float]:
    return [row["load"] for row in result["rungs"]["ours-adaptive"]]


def _short(results: Sequence[Result]) -> list[str]:
    loads = _loads(results[0])
    head = "| cell | " + " | ".join(f"{load:g}x" for load in loads) + " |"
    rule = "|---|" + "---|" * len(loads)
    deployed: list[str] = []
    static: list[str] = []
    for result in results:
        adaptive = [mean(row) for row in result["rungs"]["ours-adaptive"]]
        for table, rungs in ((deployed, DEPLOYED), (static, STATIC)):
            over = [best(result, rungs, i) for i in range(len(adaptive))]
            ratios = [f"{value / goodput:.2f} `{rung}`" for value, (rung, goodput) in zip(adaptive, over, strict=True)]
            table.append(f"| {title(result)} | {' | '.join(ratios)} |")
    return [
        "Goodput of adaptive control over the best of what can be deployed today, at the same load, and which that is:",
        "",
        *(head, rule, *deployed),
        "",
        "Goodput of adaptive control over the best static layout with our scheduler (any TPs, roles, tiers):",
        "",
        *(head, rule, *static),
    ]


def _cell(result: Result) -> list[str]:
    loads = _loads(result)
    targets = ", ".join(f"{name} {ttft:g} / {tpot:g}" for name, (ttft, tpot) in result["targets"].items())
    seeds = len(result["seeds"])
    lines = [
        f"## {title(result)}",
        "",
        f"Targets TTFT / TPOT in ms: {targets}. Load 1 is {result['rate']:g} requests/s; {result['seconds']:g} s,"
        f" {seeds} {'seeds' if seeds > 1 else 'seed'}.{_left_out(result)}",
        "",
        f"![goodput](ladder/{result['name']}.svg)",
        "",
        "| goodput at | " + " | ".join(f"{load:g}x" for load in loads) + " | 90 % up to |",
        "|---|" + "---|" * (len(loads) + 1),
    ]
    for rung, words in _words(result):
        rows = result["rungs"][rung]
        cells = [_interval([seed["goodput"] for seed in row["seeds"]]) for row in rows]
        limit = capacity([mean(row, "rate") for row in rows], [mean(row, "attainment") for row in rows])
        lines.append(
            f"| {words} (`{rung}`) | " + " | ".join(cells) + f" | {'-' if limit is None else f'{limit:.1f}/s'} |"
        )
    lines += ["", *_tiers(result), "", *_settings(result), ""]
    return lines


def _interval(values: Sequence[float]) -> str:
    middle = sum(values) / len(values)
    return f"{middle:.1f} [{min(values):.1f}, {max(values):.1f}]" if len(values) > 1 else f"{middle:.1f}"


def _tiers(result: Result) -> list[str]:
    """Attainment of each tier: what one gains at the other's cost is seen here."""
    loads = _loads(result)
    names = list(result["targets"])
    lines = [f"Attainment of {' / '.join(names)}, %:", "", "| | " + " | ".join(f"{load:g}x" for load in loads) + " |"]
    lines.append("|---|" + "---|" * len(loads))
    for rung, words in _words(result):
        cells = [" / ".join(f"{_attained(row, name):.0f}" for name in names) for row in result["rungs"][rung]]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return lines


def _attained(row: Mapping[str, Any], tier: str) -> float:
    """Share of a tier's requests of all seeds that met their targets, %."""
    counts = [seed["tiers"].get(tier, [0, 0]) for seed in row["seeds"]]
    return 100 * sum(met for _, met in counts) / max(1, sum(offered for offered, _ in counts))


def _settings(result: Result) -> list[str]:
    lines = ["Settings that were found:", ""]
    for rung, words in _words(result):
        names = dict.fromkeys(row["policy"] for row in result["rungs"][rung])
        if list(names) not in (["adaptive"], ["device-put"]):
            lines.append(f"- {words}: {', '.join(f'`{name}`' for name in names)}")
    switches = ", ".join(f"{mean(row, 'switches'):.1f}" for row in result["rungs"]["ours-adaptive"])
    return [*lines, f"- switches of adaptive control at these loads: {switches}"]
