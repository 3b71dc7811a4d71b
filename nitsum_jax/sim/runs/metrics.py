"""What a run came to, from its logs alone: goodput, attainment, latencies, utilisation, switches."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.sim.runs.records import SwitchRecord
from nitsum_jax.sim.runs.tables import RequestTable, StepTable

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, slots=True)
class TierMetrics:
    """One tier, or all together.

    Attributes:
      requests: that came.
      finished: of these.
      met: of these, both targets.
      attainment: met / requests; 1 if none came.
      goodput: met per second.
      ttft_ms, tpot_ms: by percentile, of those that have one; None where none has.
    """

    requests: int
    finished: int
    met: int
    attainment: float
    goodput: float
    ttft_ms: Mapping[str, float | None]
    tpot_ms: Mapping[str, float | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Metrics:
    """A run.

    Attributes:
      seconds: length of the workload, over which rates are taken.
      rate: requests per second that came.
      total: all requests.
      weighted_goodput: sum of the weights of the requests that met their targets, per second.
      tiers: each of the tiers.
      utilisation: share of the device time in [0, seconds] spent in steps; None without a step log.
      steps: how many; None without a step log.
      decode_tokens, prefill_tokens: computed in all steps; None without a step log.
      switches: how many; None without a switch log.
      stall_s: of all switches together; None likewise.
      kv_bytes_moved: by them; None likewise.
    """

    seconds: float
    rate: float
    total: TierMetrics
    weighted_goodput: float
    tiers: Mapping[str, TierMetrics]
    utilisation: float | None
    steps: int | None
    decode_tokens: int | None
    prefill_tokens: int | None
    switches: int | None
    stall_s: float | None
    kv_bytes_moved: float | None


def measure(
    requests: RequestTable,
    tiers: TierSet,
    seconds: float,
    *,
    devices: int = 0,
    steps: StepTable | None = None,
    switches: Sequence[SwitchRecord] | None = None,
) -> Metrics:
    """The metrics of a run.

    Whether a request met its targets is worked out from its times, not read.

    Args:
      requests: the request log.
      tiers: their targets and weights.
      seconds: length of the workload, above 0.
      devices: of the cell, at least 1; needed for the utilisation only.
      steps: the step log, if there is one.
      switches: the switch log, if there is one.

    Raises:
      InvalidInputError: a request's tier is not among the tiers.
      ValueError: seconds, or devices with a step log, is out of its range.
    """
    if not seconds > 0 or (steps is not None and devices < 1):
        raise ValueError(f"measure: {seconds=} must be above 0, and {devices=} at least 1 with a step log")
    met = requests.recomputed_met(tiers)
    weights = np.array([tiers.get(name).weight for name in requests.names])
    weighted = float(weights[requests.tier][met].sum()) / seconds if len(requests) else 0.0
    everything = np.ones(len(requests), np.bool_)
    utilisation = None
    if steps is not None:
        utilisation = float(steps.busy_device_s([0, seconds])[0]) / (seconds * devices)
    return Metrics(
        seconds,
        len(requests) / seconds,
        _tier(requests, met, everything, seconds),
        weighted,
        {tier.name: _tier(requests, met, requests.of_tier(tier.name), seconds) for tier in tiers},
        utilisation,
        None if steps is None else len(steps),
        None if steps is None else int(steps.decode_sequences.sum()),
        None if steps is None else int(steps.chunk_tokens.sum()),
        None if switches is None else len(switches),
        None if switches is None else float(sum(s.stall_s for s in switches)),
        None if switches is None else float(sum(s.kv_bytes for s in switches)),
    )


def summary(metrics: Metrics, tiers: TierSet, **about: object) -> dict[str, Any]:
    """The content of summary.json: plain values.

    Args:
      metrics: of the run.
      tiers: their targets, which a report draws in.
      **about: what the run was, such as policy="adaptive", workload=..., profile=..., devices=8, layout="tp2@0,1+...",
        rate_scale=1.0, seed=0.
    """
    targets = {t.name: {"ttft_ms": t.ttft_ms, "tpot_ms": t.tpot_ms, "weight": t.weight} for t in tiers}
    return {"schema": "nitsum-run/1", **about, "targets": targets, **dataclasses.asdict(metrics)}


def to_json(values: Mapping[str, Any]) -> str:
    """A summary as text."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def tiers_of(values: Mapping[str, Any]) -> TierSet:
    """The tiers that a summary names.

    Raises:
      InvalidInputError: they are not valid.
      KeyError: there are none.
    """
    return TierSet(tuple(Tier(name, **targets) for name, targets in values["targets"].items()))


def over_time(
    requests: RequestTable, tiers: TierSet, edges_s: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Requests that arrived between neighbouring edges, and how many of them met both targets.

    Counted by arrival, so that both speak of the same requests and their ratio is an attainment.

    Args:
      requests: the request log.
      tiers: their targets.
      edges_s: `[edges]`, ascending.

    Returns:
      Two arrays, `[edges - 1]`.
    """
    edges = np.asarray(edges_s, np.float64)
    met = requests.recomputed_met(tiers)
    arrived, _ = np.histogram(requests.arrival_s, edges)
    good, _ = np.histogram(requests.arrival_s[met], edges)
    return arrived, good


def table(runs: Mapping[str, Metrics]) -> str:
    """A Markdown table, one line for each run."""
    names = list(dict.fromkeys(name for m in runs.values() for name in m.tiers))
    head = ["run", "requests/s", "goodput/s", "attainment", *names, "TTFT p50 / p99, ms", "TPOT p50 / p99, ms"]
    head += ["utilisation", "switches", "stall, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for run, m in runs.items():
        cells = [run, f"{m.rate:.2f}", f"{m.total.goodput:.2f}", f"{m.total.attainment:.1%}"]
        cells += [f"{m.tiers[name].attainment:.1%}" if name in m.tiers else "" for name in names]
        for latency in (m.total.ttft_ms, m.total.tpot_ms):
            cells.append(" / ".join("-" if latency[p] is None else f"{latency[p]:.0f}" for p in ("p50", "p99")))
        cells.append("-" if m.utilisation is None else f"{m.utilisation:.1%}")
        cells.append("-" if m.switches is None else str(m.switches))
        cells.append("-" if m.stall_s is None else f"{m.stall_s:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _tier(
    requests: RequestTable, met: npt.NDArray[np.bool_], rows: npt.NDArray[np.bool_], seconds: float
) -> TierMetrics:
    count, good = int(rows.sum()), int((met & rows).sum())
    return TierMetrics(
        count,
        int((~np.isnan(requests.finish_s) & rows).sum()),
        good,
        good / count if count else 1.0,
        good / seconds,
        _percentiles(requests.ttft_s[rows] * 1000),
        _percentiles(requests.tpot_s[rows] * 1000),
    )


def _percentiles(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    values = values[~np.isnan(values)]
    if not len(values):
        return {f"p{p}": None for p in PERCENTILES}
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
