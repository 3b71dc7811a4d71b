"""What a played workload came to: records as the simulator writes them, the figures, and whether they hold."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from nitsum_jax.bench.serve.player import Played, PlayedRun
from nitsum_jax.control.job import met
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import PreconditionError
from nitsum_jax.sim.runs.metrics import Metrics, TierMetrics, measure
from nitsum_jax.sim.runs.records import RequestRecord
from nitsum_jax.sim.runs.tables import RequestTable

LATE_SHARE = 0.05
"""A client that sends later than this share of the tightest TTFT target (99th percentile) was itself the bottleneck."""
CPU_SHARE = 0.85


def records_of(run: PlayedRun, tiers: TierSet, time_scale: float, warm_up_s: float = 0.0) -> list[RequestRecord]:
    """Request records on the workload's clock, those of the warm-up left out.

    Args:
      run: what was played.
      tiers: of the requests.
      time_scale: seconds of the client for one of the workload.
      warm_up_s: requests that arrive before are left out, and times begin there.
    """
    records = []
    for number, one in enumerate(run.played):
        if one.request.arrival_s < warm_up_s:
            continue
        tier = tiers.get(one.request.tier)
        # TTFT counts from when it was sent: the client's lateness is counted separately.
        arrival = one.sent_s / time_scale - warm_up_s
        first = None if one.first_s is None else one.first_s / time_scale - warm_up_s
        finish = None if one.last_s is None or not one.complete else one.last_s / time_scale - warm_up_s
        ok = met(tier, arrival, first, finish, one.request.output_tokens)
        request = one.request
        records.append(
            RequestRecord(
                str(number), request.tier, arrival, request.prompt_tokens, request.output_tokens, first, finish, (), ok
            )
        )
    return records


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """Figures of a run.

    Attributes:
      metrics: as of the simulator.
      records: of the requests counted.
      errors: how many requests ended with each status of gRPC.
      lag_p99_ms: how late the client sent, on the workload's clock.
      cpu_share: of the client.
      invalid: why the figures do not hold; empty if they do.
      paced: profile at whose pace the server ran; None: at its own.
      control_share: processor seconds of the server's control loop and planner per second of the run.
      late_steps: share of the steps of a paced server that came later than their pace.
    """

    metrics: Metrics
    records: Sequence[RequestRecord]
    errors: dict[str, int]
    lag_p99_ms: float
    cpu_share: float
    invalid: tuple[str, ...]
    paced: str | None
    control_share: float = 0.0
    late_steps: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "paced": self.paced,
            "valid": not self.invalid,
            "invalid": list(self.invalid),
            "errors": self.errors,
            "client": {"lag_p99_ms": self.lag_p99_ms, "cpu_share": self.cpu_share},
            "control_cpu_share": self.control_share,
            "late_steps": self.late_steps,
            "metrics": dataclasses.asdict(self.metrics),
        }

    def table(self) -> str:
        """For people."""
        head = ("tier", "requests", "attainment", "goodput/s", "TTFT p50/p99 ms", "TPOT p50/p99 ms")
        rows = [head, *(_row(name, tier) for name, tier in self.metrics.tiers.items() if tier.requests)]
        rows.append(_row("all", self.metrics.total))
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.paced:
            lines.insert(0, f"PACED at {self.paced}: no figure below is of this machine")
        if self.late_steps is not None:
            lines.append(f"{self.late_steps:.1%} of the server's steps came later than their pace")
        if self.control_share:
            lines.append(f"the server's control loop and planner used {self.control_share:.2%} of a core")
        if self.errors:
            lines.append("ended otherwise: " + ", ".join(f"{count} {code}" for code, count in self.errors.items()))
        lines += [f"INVALID: {reason}" for reason in self.invalid]
        return "\n".join(lines)


def results_of(
    run: PlayedRun,
    tiers: TierSet,
    seconds: float,
    *,
    time_scale: float = 1.0,
    warm_up_s: float = 0.0,
    paced: str | None = None,
    late_steps: float | None = None,
    late_limit: float = 0.05,
    control_share: float = 0.0,
) -> Results:
    """Works out the figures, and whether client and server kept up.

    Args:
      run: what was played.
      tiers: of the requests.
      seconds: length of the workload.
      time_scale: seconds of the client for one of the workload.
      warm_up_s: left out at the beginning.
      paced: profile at whose pace the server ran.
      late_steps: share of the steps for which a paced server was too slow.
      late_limit: above it the run does not count.
      control_share: processor seconds of the server's control per second of the run.

    Raises:
      PreconditionError: no request is left after the warm-up.
    """
    records = records_of(run, tiers, time_scale, warm_up_s)
    if not records:
        raise PreconditionError("no request came after the warm-up: give a longer --seconds or a shorter --warm_up")
    metrics = measure(RequestTable.of(records), tiers, seconds - warm_up_s)
    lag_ms = 1000 * run.lag_p99_s / time_scale
    tightest = min(tiers.get(one.request.tier).ttft_ms for one in run.played)
    invalid = []
    if lag_ms > LATE_SHARE * tightest:
        invalid.append(f"the client itself sent {lag_ms:.0f} ms late (p99): use a faster machine or a lower rate")
    if run.cpu_share > CPU_SHARE:
        invalid.append(f"the client used {run.cpu_share:.0%} of a core: it may have been the bottleneck")
    if late_steps is not None and late_steps > late_limit:
        invalid.append(f"the server was too slow for the pace in {late_steps:.1%} of its steps: raise --time_scale")
    errors = _errors(run.played)
    return Results(metrics, records, errors, lag_ms, run.cpu_share, tuple(invalid), paced, control_share, late_steps)


def write_json(results: Results, path: str | pathlib.Path) -> None:
    """Writes --json."""
    pathlib.Path(path).write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")


def _errors(played: Sequence[Played]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for one in played:
        if not one.complete:
            code = one.error or "INCOMPLETE"
            counts[code] = counts.get(code, 0) + 1
    return counts


def _row(name: str, tier: TierMetrics) -> tuple[str, ...]:
    def pair(values: Any) -> str:
        low, high = values["p50"], values["p99"]
        return "-" if low is None or high is None else f"{low:.1f} / {high:.1f}"

    return (
        name,
        str(tier.requests),
        f"{tier.attainment:.1%}",
        f"{tier.goodput:.2f}",
        pair(tier.ttft_ms),
        pair(tier.tpot_ms),
    )
