"""Goodput over the load, a line for each rung."""

import pathlib
from collections.abc import Mapping
from typing import Any

from nitsum_jax.sim.study.plots import drawing

_LINES: Mapping[str, tuple[str, str, str]] = {  # rung: label, colour, style
    "ours-adaptive": ("ours, adaptive", "#d1495b", "-"),
    "ours-static-mixed": ("ours, best static layout", "#222222", "-"),
    "ours-static-tp": ("ours, best static TP", "#222222", "--"),
    "ours-apart": ("ours, tiers apart", "#222222", ":"),
    "chiron": ("Chiron style", "#edae49", "-"),
    "dynamo": ("Dynamo style", "#8d6a9f", "-"),
    "flying": ("Flying style", "#5f7fb8", "-"),
    "split": ("P/D split, FCFS", "#00798c", "-"),
    "apart": ("tiers apart, FCFS", "#66a182", "-"),
    "least-loaded": ("Llumnix style", "#999999", "--"),
    "vanilla-timeouts": ("vanilla, timeouts", "#999999", ":"),
    "vanilla": ("vanilla FCFS", "#999999", "-"),
}


def title(result: Mapping[str, Any]) -> str:
    """A cell in words."""
    return f"{result['model']}, {result['devices']} {result['device'].split(',')[0]}, {result['mix']}"


def ladder_plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the mean over the seeds, with a band from the least to the largest."""
    with drawing(path, 6.4, 3.8) as axes:
        for rung, (label, colour, style) in _LINES.items():
            rows = result["rungs"].get(rung, [])
            if not rows:
                continue
            loads = [row["load"] for row in rows]
            values = [[seed["goodput"] for seed in row["seeds"]] for row in rows]
            middle = [sum(row) / len(row) for row in values]
            wide = 2.0 if rung == "ours-adaptive" else 1.2
            axes.plot(loads, middle, color=colour, linestyle=style, linewidth=wide, label=label)
            axes.fill_between(
                loads, [min(row) for row in values], [max(row) for row in values], color=colour, alpha=0.12, linewidth=0
            )
        axes.set_xlabel(f"load; 1 is {result['rate']:g} requests/s")
        axes.set_ylabel("goodput, requests/s")
        axes.set_ylim(bottom=0)
        axes.set_title(title(result), fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
