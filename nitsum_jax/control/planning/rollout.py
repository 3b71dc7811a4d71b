"""What-if: the last requests run once more through the model of the cell, under another plan."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from nitsum_jax.control.model.cell import MAX_BATCH, CellModel, ModelWorker, Recorder
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout

_LOOK = 16  # arrivals between two looks at what is late
_LOOK_S = 0.5


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


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """What a replay came to.

    Attributes:
      share: of the weighted requests that counted, what met both targets; where it was given up, at the most so much.
      missed: weight of those that did not.
      late: numbers of the arrivals that missed.
      given_up: it was ended early.
      count: requests that it ran.
    """

    share: float
    missed: float
    late: frozenset[int]
    given_up: bool
    count: int


class _Tally(Recorder):
    """Requests that missed their targets, from the one numbered `first` on."""

    def __init__(self, first: int) -> None:
        self.missed = 0.0
        self.late: set[int] = set()
        self._first = first

    def finished(self, job: ModelJob) -> None:
        """Counts it if it missed a target."""
        if not job.met():
            self.miss(job)

    def failed(self, job: ModelJob, reason: str) -> None:
        """It missed both."""
        self.miss(job)

    def miss(self, job: ModelJob) -> None:
        """Counts a request that will not meet its targets, once."""
        number = int(job.id)
        if number >= self._first and number not in self.late:
            self.late.add(number)
            self.missed += job.tier.weight


def rollout(
    cost: CostModel,
    tiers: Iterable[Tier],
    plan: Layout,
    arrivals: Sequence[Arrival],
    loads: Sequence[TierLoad],
    resident_tp: int | None = None,
    *,
    waiting: Sequence[Arrival] = (),
    pressure: float = 1.0,
    most_missed: float = math.inf,
    max_batch: int = MAX_BATCH,
) -> Replay:
    """Which requests meet both targets when they come to a cell with this plan in which none decodes yet.

    The first quarter of them only fill the cell and are not counted.

    Args:
      cost: what steps take.
      tiers: targets.
      plan: in force from the first request to the last.
      arrivals: at least one, in order.
      loads: expected outputs of the tiers.
      resident_tp: see `CellModel`.
      waiting: requests that are there when the first comes; their times say how long before (negative).
      pressure: they come so many times as fast.
      most_missed: given up when a larger weight has missed.
      max_batch: most requests of an instance.
    """
    known = {tier.name: tier for tier in tiers}
    scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(cost, tuple(known.values()))
    for load in loads:
        scheduler.expect_output(load.tier, load.output)
    first = len(arrivals) // 4
    offered = sum(known[arrival.tier].weight for arrival in (*arrivals[first:], *waiting))
    tally = _Tally(first)
    start_s = arrivals[0].time_s
    cell = CellModel(
        cost,
        scheduler,
        plan,
        recorder=tally,
        max_batch=max_batch,
        resident_tp=resident_tp,
        now_s=start_s,
    )

    def lost() -> bool:
        for job in cell.alive.values():
            if job.late or (job.first_token_s is None and job.ttft_deadline_s < cell.now_s):
                tally.miss(job)
        return tally.missed > most_missed

    given_up = False
    count = len(waiting)
    for i, arrival in enumerate(waiting, len(arrivals)):
        time_s = start_s + arrival.time_s
        cell.add(ModelJob(str(i), known[arrival.tier], time_s, arrival.prompt_tokens, max(1, arrival.output_tokens)))
    for i, arrival in enumerate(arrivals):
        time_s = start_s + (arrival.time_s - start_s) / pressure
        cell.run_until(time_s)
        job = ModelJob(str(i), known[arrival.tier], time_s, arrival.prompt_tokens, max(1, arrival.output_tokens))
        cell.add(job)
        count += 1
        if i % _LOOK == 0 and lost():
            given_up = True
            break
    # What is late already misses whatever comes: it is not waited for.
    while not given_up and cell.next_event_s() < math.inf and any(not job.late for job in cell.alive.values()):
        cell.run_until(cell.next_event_s() + _LOOK_S)
        given_up = lost()
    return Replay(1 - tally.missed / offered, tally.missed, frozenset(tally.late), given_up, count)
