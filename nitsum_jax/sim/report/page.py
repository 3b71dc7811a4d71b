"""Puts a report together: numbers and figures into one HTML page."""

import dataclasses
import importlib.resources
import pathlib
from collections.abc import Sequence
from typing import Any

import jinja2

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.report import compare, figures, style
from nitsum_jax.sim.report.runs import ReportedRun, open_run

MOST_DETAILED = 6


@dataclasses.dataclass(frozen=True, slots=True)
class _Detail:
    """Figures of one run."""

    title: str
    timeline: str
    latencies: str


def write_report(
    folders: Sequence[str | pathlib.Path],
    path: str | pathlib.Path,
    *,
    title: str = "Simulated runs",
    most_detailed: int = MOST_DETAILED,
) -> None:
    """Writes the report of the runs in these folders.

    Args:
      folders: each with the summary.json of a run; figures over time are drawn of those with logs beside it.
      path: of the HTML file.
      title: of the page.
      most_detailed: runs of which the logs are read and drawn, the first ones.

    Raises:
      InvalidInputError: there are no runs, a folder has none, a log is wrong, or the file cannot be written.
      PreconditionError: matplotlib is not installed.
    """
    text = report([open_run(folder) for folder in folders], title=title, most_detailed=most_detailed)
    try:
        pathlib.Path(path).write_text(text, encoding="utf-8")
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot write the report: {e.strerror or e}") from e


def report(runs: Sequence[ReportedRun], *, title: str = "Simulated runs", most_detailed: int = MOST_DETAILED) -> str:
    """The page as text; see write_report."""
    if not runs:
        raise InvalidInputError("a report needs at least one run")
    logged = [run for run in runs if run.has_logs]
    details = []
    comparison = None
    with style.drawing():
        if compare.comparable(runs):
            comparison = style.svg_uri(compare.attainment_by_rate(runs))
        for run in logged[:most_detailed]:
            logs = run.logs()
            details.append(
                _Detail(
                    _name(run),
                    style.svg_uri(figures.timeline(run, logs)),
                    style.svg_uri(figures.latencies(run, logs.requests)),
                )
            )
    # Autoescape: names of policies, tiers and folders are the user's.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"percent": _percent, "number": _number}
    source = importlib.resources.files("nitsum_jax.sim.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title,
        settings=_settings(runs),
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        tiers=_tier_rows(runs),
        names=list(dict.fromkeys(name for run in runs for name in run.tiers.names)),
        rows=[_row(run) for run in _in_order(runs)],
        comparison=comparison,
        rates=any(compare.over_rates(group) for group in compare.by_setting(runs).values()),
        details=details,
        left_out=len(logged) - len(details),
        aim=compare.AIM,
    )


def _name(run: ReportedRun) -> str:
    return f"{run.policy} at {run.rate:.3g} requests/s"


def _settings(runs: Sequence[ReportedRun]) -> list[str]:
    return list(dict.fromkeys(run.setting for run in runs if run.setting))


def _in_order(runs: Sequence[ReportedRun]) -> list[ReportedRun]:
    """By setting and policy as they first come, and within them by rate."""
    settings, policies = ([*dict.fromkeys(names)] for names in ((r.setting for r in runs), (r.policy for r in runs)))
    return sorted(runs, key=lambda r: (settings.index(r.setting), policies.index(r.policy), r.rate))


def _tiles(run: ReportedRun) -> list[tuple[str, str, str]]:
    """(figure, what it is, more about it) of a single run."""
    total = run.summary["total"]
    tiles = [
        (f"{total['goodput']:.2f}/s", "goodput", f"of {run.rate:.2f} requests/s that came"),
        (_percent(total["attainment"]), "attainment", f"{total['met']:,} of {total['requests']:,} requests"),
        (_number(total["ttft_ms"]["p99"], " ms"), "TTFT, 99 %", f"median {_number(total['ttft_ms']['p50'], ' ms')}"),
        (_number(total["tpot_ms"]["p99"], " ms"), "TPOT, 99 %", f"median {_number(total['tpot_ms']['p50'], ' ms')}"),
    ]
    if run.summary.get("utilisation") is not None:
        tiles.append((_percent(run.summary["utilisation"]), "device time in steps", "while requests came"))
    if run.summary.get("switches") is not None:
        stall = _number(1000 * run.summary["stall_s"], " ms")
        tiles.append((str(run.summary["switches"]), "switches", f"{stall} of stall in all"))
    return tiles


def _tier_rows(runs: Sequence[ReportedRun]) -> list[dict[str, Any]]:
    """Targets of the tiers, each different one once."""
    tiers = dict.fromkeys(tier for run in runs for tier in run.tiers)
    return [{"name": t.name, "ttft": t.ttft_ms, "tpot": t.tpot_ms, "weight": t.weight} for t in tiers]


def _row(run: ReportedRun) -> dict[str, Any]:
    total = run.summary["total"]
    return {
        "policy": run.policy,
        "setting": run.setting,
        "rate": run.rate,
        "goodput": total["goodput"],
        "weighted": run.summary.get("weighted_goodput"),
        "attainment": total["attainment"],
        "tiers": {name: tier["attainment"] for name, tier in run.summary["tiers"].items()},
        "ttft": total["ttft_ms"],
        "tpot": total["tpot_ms"],
        "utilisation": run.summary.get("utilisation"),
        "switches": run.summary.get("switches"),
        "stall_s": run.summary.get("stall_s"),
    }


def _percent(value: float | None) -> str:
    if value is None:
        return "–"  # noqa: RUF001
    # What is not all must not look like all.
    text = f"{100 * value:.1f}"
    return f"{'99.9' if text == '100.0' and value < 1 else text} %"


def _number(value: float | None, unit: str = "") -> str:
    """Three digits, thousands apart."""
    if value is None:
        return "–"  # noqa: RUF001
    if value >= 100 or value == int(value):
        return f"{value:,.0f}{unit}"
    return f"{value:.3g}{unit}"
