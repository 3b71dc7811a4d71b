"""What a request of each tier would get if it came now, by the predictions that the scheduler itself goes by.

Pure.  A router over many cells, an autoscaler and the metrics read this; the cell itself decides with the same numbers
request by request.
"""

import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import MIXED, PREFILL
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier

USUAL_PROMPT = 512
"""Tokens of a prompt that nothing else is known of."""

_MOST_SHARE = 0.95  # of an instance's time that its decode steps are taken to need beside prompts


@dataclasses.dataclass(frozen=True, slots=True)
class TierForecast:
    """A tier, now.

    Attributes:
      tier: name.
      ttft_s: time to the first token of a usual request.
      tpot_s: its time per output token.
      wait_s: the part of ttft_s that its own prompt does not take: steps under way, prompts before it, room.
      stretch: seconds that a second of its own prefill takes beside what decodes, at least 1.
      tightest_s: least TPOT of those in time that would decode beside it; infinite without any.
    """

    tier: str
    ttft_s: float
    tpot_s: float
    wait_s: float = 0.0
    stretch: float = 1.0
    tightest_s: float = math.inf

    def scaled(self, scale: float) -> "TierForecast":
        """With this many seconds for each of its own."""
        return dataclasses.replace(
            self,
            ttft_s=self.ttft_s * scale,
            tpot_s=self.tpot_s * scale,
            wait_s=self.wait_s * scale,
            tightest_s=self.tightest_s * scale,
        )


class Probe(Job):
    """A request that has not come."""

    def __init__(self, tier: Tier, now_s: float, prompt_tokens: int):
        """One of a tier that would come now."""
        super().__init__("", tier, now_s, prompt_tokens)
        self.due_s = self.ttft_deadline_s

    @property
    def target(self) -> int:
        """As of `Job`."""
        return self.prompt_tokens

    @property
    def cached(self) -> int:
        """As of `Job`."""
        return 0

    @property
    def generated(self) -> int:
        """As of `Job`."""
        return 0


def forecast(
    scheduler: Scheduler, workers: Sequence[Worker], tier: Tier, now_s: float, prompt_tokens: int = USUAL_PROMPT
) -> TierForecast:
    """What a request would get.

    Args:
      scheduler: of the cell.
      workers: its instances.
      tier: of the request.
      now_s: the time.
      prompt_tokens: length of its prompt.

    Returns:
      Of the instance with the earliest first token; infinite times where no instance takes any.
    """
    probe = Probe(tier, now_s, prompt_tokens)
    probe.expected_output = scheduler.expected_output(tier.name)
    probe.latest_start_s = probe.due_s - scheduler.predict.prefill_s(scheduler.cost.tps[-1], prompt_tokens)
    takers = [worker for worker in workers if worker.serves_prompts and not scheduler.predict.keeps_out(worker, probe)]
    ahead = [job.target for job in scheduler.backlog.before(probe.due_s, probe.latest_start_s)]
    decodes_s = min((_decode_s(scheduler, w, probe) for w in workers if w.takes_decodes), default=math.inf)
    found = [_of(scheduler, worker, probe, now_s, ahead, len(takers), decodes_s) for worker in takers]
    return min(found, key=lambda one: (one.ttft_s, one.tpot_s), default=TierForecast(tier.name, math.inf, math.inf))


def _of(
    scheduler: Scheduler,
    worker: Worker,
    probe: Job,
    now_s: float,
    ahead: Sequence[int],
    takers: int,
    decodes_s: float,
) -> TierForecast:
    """That of one instance, which `takers` share the prompts before it with."""
    predict, tier = scheduler.predict, probe.tier
    share, step_s, tightest_s = 0.0, decodes_s, math.inf
    if worker.plan.role == MIXED:
        step_s, tightest_s = _decode_s(scheduler, worker, probe), worker.tightest_tpot_s()
        if worker.decoding:
            share = min(_MOST_SHARE, step_s / min(tier.tpot_ms / 1000, tightest_s))
    own_s = predict.prefill_s(worker.tp, probe.target)
    ahead_s = sum(predict.prefill_s(worker.tp, tokens) for tokens in ahead) / takers
    before_s = predict.work_s(worker, probe) - own_s + ahead_s
    stretch = 1 / (1 - share)
    wait_s = worker.busy_s(now_s) + _room_s(scheduler, worker, probe) + before_s * stretch
    return TierForecast(tier.name, wait_s + own_s * stretch, step_s, wait_s, stretch, tightest_s)


def _decode_s(scheduler: Scheduler, worker: Worker, probe: Job) -> float:
    return scheduler.predict.decode_s(worker, probe)


def _room_s(scheduler: Scheduler, worker: Worker, probe: Job) -> float:
    """Time until a request that finds no room has some: until the first of those that decode is expected to end."""
    if worker.jobs < worker.max_batch and scheduler.predict.fits(worker, probe):
        return 0.0
    if worker.plan.role == PREFILL or not worker.decoding:
        return scheduler.predict.prefill_s(worker.tp, max(1, worker.prefill_left))
    count = len(worker.decoding)
    return worker.growth_tokens() / count**2 * _decode_s(scheduler, worker, probe)
