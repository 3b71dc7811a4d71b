"""Picture of a run against a server: goodput and attainment over time, and how long requests took."""

import pathlib
from collections.abc import Sequence

import numpy as np

from nitsum_jax.bench.serve.results import Results
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.report import style
from nitsum_jax.sim.runs.records import RequestRecord

_BINS = 30


def save_plot(results: Results, tiers: TierSet, seconds: float, path: str | pathlib.Path) -> None:
    """Writes the picture; its kind follows the ending of its name.

    Raises:
      InvalidInputError: it cannot be written.
    """
    figure = style.new_figure(10.5, 6.2)
    (attained, goodput), (ttft, tpot) = figure.subplots(2, 2)
    names = [tier.name for tier in tiers if any(record.tier == tier.name for record in results.records)]
    colours = style.name_colours(names)
    edges = np.linspace(0, seconds, min(_BINS, max(2, int(seconds))) + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    for name in names:
        mine = [record for record in results.records if record.tier == name]
        came = np.histogram([record.arrival_s for record in mine], edges)[0]
        met = np.histogram([record.arrival_s for record in mine if record.met], edges)[0]
        share = np.where(came > 0, met / np.maximum(came, 1), np.nan)
        attained.plot(middles, share, color=colours[name], label=name)
        goodput.plot(middles, met / np.diff(edges), color=colours[name])
        goodput.plot(middles, came / np.diff(edges), color=colours[name], linestyle=":", linewidth=1)
        tier = tiers.get(name)
        for axes, values, target in ((ttft, _ttfts_ms(mine), tier.ttft_ms), (tpot, _tpots_ms(mine), tier.tpot_ms)):
            axes.axvline(target, color=colours[name], linestyle="--", linewidth=1)
            if len(values):
                axes.plot(np.sort(values), np.arange(1, len(values) + 1) / len(values), color=colours[name])
    attained.set(title="Attainment, by arrival", ylim=(-0.02, 1.02), xlabel="seconds")
    goodput.set(title="Goodput (dotted: what came), requests/s", xlabel="seconds")
    ttft.set(title="Time to first token (dashed: target)", xlabel="ms", xscale="log", ylabel="share of requests")
    tpot.set(title="Time per output token", xlabel="ms", xscale="log")
    attained.legend(loc="lower left")
    if results.paced:
        figure.suptitle(f"PACED at {results.paced}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--plot={path} cannot be written: {' '.join(str(error).split())}") from None


def _ttfts_ms(records: Sequence[RequestRecord]) -> list[float]:
    return [1000 * (r.first_token_s - r.arrival_s) for r in records if r.first_token_s is not None]


def _tpots_ms(records: Sequence[RequestRecord]) -> list[float]:
    return [
        1000 * (r.finish_s - r.first_token_s) / (r.output_tokens - 1)
        for r in records
        if r.finish_s is not None and r.first_token_s is not None and r.output_tokens > 1
    ]
