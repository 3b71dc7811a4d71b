"""Plots of the study."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_STYLE: Any = {"svg.hashsalt": "nitsum", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
_COLOURS = {
    "adaptive": "#d1495b",
    "static": "#222222",
    "distserve": "#00798c",
    "sarathi": "#edae49",
    "apart": "#66a182",
    "dynamo": "#8d6a9f",
    "flying": "#5f7fb8",
}


@contextlib.contextmanager
def drawing(path: pathlib.Path, width: float, height: float) -> Iterator[Axes]:
    """Axes to draw on; written to the path in the end, the same bytes for the same lines."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
        yield axes
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def attainment_plot(result: Mapping[str, Any], path: pathlib.Path) -> None:
    """Attainment of every policy over the rate, with the target drawn in."""
    with drawing(path, 6.4, 3.6) as axes:
        for family, row in result["families"].items():
            points = [(rate, share) for rate, share, _, given_up in row["curve"] if not given_up]
            if not points:
                continue
            rates, shares = zip(*points, strict=True)
            grey = family.startswith("static-tp")
            axes.plot(
                rates,
                [100 * share for share in shares],
                marker="o",
                markersize=3,
                linewidth=1 if grey else 1.6,
                linestyle=":" if grey else "-",
                color="#999999" if grey else _COLOURS.get(family),
                label=family,
            )
            if grey:
                name = family.removeprefix("static-")
                axes.annotate(name, (rates[-1], 100 * shares[-1]), fontsize=7, color="#777777")
        axes.axhline(90, color="#bbbbbb", linewidth=0.8)
        bound = result["bound"]
        axes.plot([bound["rate"]], [100 * bound["attainment"]], marker="_", markersize=12, color="#d1495b")
        axes.annotate("bound", (bound["rate"], 100 * bound["attainment"]), fontsize=7, color="#d1495b")
        axes.set_xscale("log")
        axes.set_xlabel("requests per second")
        axes.set_ylabel("attainment, %")
        axes.set_title(f"{result['model']}, {result['device']}: {result['mix']}", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="lower left")


def capacity_plot(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Capacity of every policy as a multiple of the best static layout's, for all cells."""
    families = [family for family in _COLOURS if family != "static"]
    with drawing(path, 6.4, 0.8 + 0.42 * len(results)) as axes:
        names = []
        for i, result in enumerate(reversed(results)):
            names.append(result["name"].replace("_", " "))
            rows = result["families"]
            static = rows["static"]["capacity"]
            for family in families:
                if family in rows and static > 0:
                    axes.plot(
                        [rows[family]["capacity"] / static],
                        [i],
                        marker="D" if family == "adaptive" else "o",
                        markersize=6 if family == "adaptive" else 4,
                        linestyle="",
                        color=_COLOURS[family],
                        label=family if i == 0 else None,
                    )
        axes.axvline(1, color=_COLOURS["static"], linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.set_xlabel("capacity as a multiple of the best static layout's")
        axes.legend(fontsize=7, frameon=False, loc="upper center", ncols=6, bbox_to_anchor=(0.4, 1.12))
