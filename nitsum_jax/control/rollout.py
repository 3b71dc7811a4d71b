"""What-if: the last requests run once more through the model of the cell, under another plan."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from nitsum_jax.control.cell import CellModel
from nitsum_jax.control.cost_model import CostModel
from nitsum_jax.control.estimate import TierLoad
from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import CellPlan
from nitsum_jax.control.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier
from nitsum_jax.control.worker import Worker


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A request that came, as far as it is known.

    Attributes:
      time_s: when.
      tier: name.
      prompt_tokens: its length.
      output_tokens: what it made, or is expected to make.
    """

    time_s: float
    tier: str
    prompt_tokens: int
    output_tokens: int


class _Tally:
    """Weight of the requests that met their targets, from the one numbered `first` on."""

    def __init__(self, first: int) -> None:
        self.met = 0.0
        self._first = first

    def step(self, worker: Worker, *_: object) -> None:
        """Not counted."""

    def finished(self, job: Job) -> None:
        """Counts it if it met its targets."""
        if int(job.id) >= self._first and job.met():
            self.met += job.tier.weight

    def failed(self, job: Job, reason: str) -> None:
        """Counts for nothing."""


def rollout(
    cost: CostModel,
    tiers: Iterable[Tier],
    plan: CellPlan,
    arrivals: Sequence[Arrival],
    loads: Sequence[TierLoad],
    resident_tp: int | None = None,
) -> float:
    """Share of the weighted requests that meet both targets when they come to an empty cell with this plan.

    The first third of them only fill the cell and are not counted.
    """
    known = {tier.name: tier for tier in tiers}
    scheduler = Scheduler(cost, tuple(known.values()))
    for load in loads:
        scheduler.expect_output(load.tier, load.output)
    first = len(arrivals) // 3
    tally = _Tally(first)
    cell = CellModel(cost, scheduler, plan, recorder=tally, resident_tp=resident_tp, now_s=arrivals[0].time_s)
    for i, arrival in enumerate(arrivals):
        cell.run_until(arrival.time_s)
        job = Job(str(i), known[arrival.tier], arrival.time_s, arrival.prompt_tokens, max(1, arrival.output_tokens))
        cell.add(job)
    cell.run_until(math.inf)
    return tally.met / sum(known[arrival.tier].weight for arrival in arrivals[first:])
