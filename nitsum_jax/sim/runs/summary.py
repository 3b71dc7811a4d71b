"""The figures of a run that searches and studies keep: small, and made of plain values."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nitsum_jax.sim.runs.simulation import RunOutcome

WINDOW_S = 60.0
_PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """What a run came to.

    Attributes:
      policy: its name, with its settings.
      offered: requests that came.
      met: those that met both targets.
      seconds: length of the workload.
      tiers: per tier: offered, met, and the 50th, 90th and 99th percentiles of TTFT and TPOT in ms.
      windows: per window of `WINDOW_S` seconds: requests that came in it, and those of them that met both targets.
      utilisation: share of the devices' time spent in steps.
      switches: how many.
      stall_s: time between the stop and the start of instances, all switches together.
      requeued: requests that lost their KV cache in a switch.
      preemptions: requests that lost it for want of room, those in switches included.
      given_up: the run was ended early; only an upper bound of its attainment is known.
      plans: all that were in force after a switch: per instance its devices, role and tiers.
    """

    policy: str
    offered: int
    met: int
    seconds: float
    tiers: Mapping[str, Mapping[str, Any]]
    windows: Sequence[Sequence[int]]
    utilisation: float
    switches: int = 0
    stall_s: float = 0.0
    requeued: int = 0
    preemptions: int = 0
    given_up: bool = False
    plans: Sequence[Any] = ()

    @property
    def attainment(self) -> float:
        """Share that met both targets; 1 if nothing came."""
        return self.met / self.offered if self.offered else 1.0

    @property
    def goodput(self) -> float:
        """Requests a second that met both targets."""
        return self.met / self.seconds

    @property
    def rate(self) -> float:
        """Requests a second that came."""
        return self.offered / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Plain values for `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Figures":
        """Reads what `to_json` wrote."""
        return Figures(**values)


def figures_of(outcome: RunOutcome, num_devices: int) -> Figures:
    """Sums a run up."""
    count = max(1, int(-(-outcome.seconds // WINDOW_S)))
    windows = [[0, 0] for _ in range(count)]
    rows: dict[str, list[tuple[float, float | None, bool]]] = {}
    met_count = 0
    for job in outcome.finished:
        met = job.met()
        met_count += met
        place = windows[min(count - 1, int(job.arrival_s // WINDOW_S))]
        place[0] += 1
        place[1] += met
        assert job.first_token_s is not None
        assert job.finish_s is not None
        ttft_ms = (job.first_token_s - job.arrival_s) * 1000
        more = job.output_tokens - 1
        tpot_ms = (job.finish_s - job.first_token_s) * 1000 / more if more else None
        rows.setdefault(job.tier.name, []).append((ttft_ms, tpot_ms, met))
    for job in outcome.failed:
        windows[min(count - 1, int(job.arrival_s // WINDOW_S))][0] += 1
    tiers = {}
    for name, of_tier in sorted(rows.items()):
        ttfts = np.array([row[0] for row in of_tier])
        tpots = np.array([row[1] for row in of_tier if row[1] is not None] or [0.0])
        tiers[name] = {
            "finished": len(of_tier),
            "met": sum(row[2] for row in of_tier),
            "ttft_ms": [round(float(p), 3) for p in np.percentile(ttfts, _PERCENTILES)],
            "tpot_ms": [round(float(p), 3) for p in np.percentile(tpots, _PERCENTILES)],
        }
    # What a run that was given up would still have met is not known: it is taken to have met all that it did not miss.
    met_count = outcome.offered - outcome.missed if outcome.given_up else met_count
    return Figures(
        policy=outcome.policy,
        offered=outcome.offered,
        met=met_count,
        seconds=outcome.seconds,
        tiers=tiers,
        windows=windows,
        utilisation=outcome.busy_s / (max(outcome.end_s, 1e-9) * num_devices),
        switches=len(outcome.switches),
        stall_s=sum(report.stall_s for report in outcome.switches),
        requeued=sum(report.requeued for report in outcome.switches),
        preemptions=outcome.preemptions,
        given_up=outcome.given_up,
        plans=_plans(outcome),
    )


def _plans(outcome: RunOutcome) -> list[Any]:
    plans = {
        report.after.unplaced: [[list(i.devices), i.role, list(i.tiers)] for i in report.after.instances]
        for report in outcome.switches
    }
    return list(plans.values())
