"""What a scheduler asks about a request and an instance: does it fit, how long will it take, whom does it harm.

Pure: everything follows from the cost model and what the instance holds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import MIXED, PREFILL
from nitsum_jax.control.scheduling.scheduler_config import SchedulerConfig
from nitsum_jax.control.scheduling.urgency import urgency
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier

REACH = 0.96
"""Share of its time per token that a request alone in an instance may take to be in time there."""

W = TypeVar("W", bound=Worker)


class Predictions:
    """Answers for one cell; times that are asked for often are kept until `forget_times`."""

    def __init__(self, cost: CostModel, tiers: Sequence[Tier], config: SchedulerConfig):
        """Predicts with a cost model, for requests of these tiers."""
        self.cost = cost
        self.tiers = tiers
        self.config = config
        self._prefill_s: dict[tuple[int, int], float] = {}
        self._alone_s: dict[int, float] = {}

    def prefill_s(self, tp: int, tokens: int) -> float:
        """Time to prefill so many tokens alone, to the next 64, or 16 of a short prompt."""
        grain = 64 if tokens > 256 else 16
        key = (tp, -(-tokens // grain) * grain)
        found = self._prefill_s.get(key)
        if found is None:
            found = self._prefill_s[key] = self.cost.prefill_s(tp, key[1])
        return found

    def full(self, tp: int, tightest_s: float) -> float:
        """Share of the tightest TPOT that a decode step may take, so that some of it is left for prompts.

        Where even a step of one request takes most of it, half of the rest.
        """
        alone_s = self._alone_s.get(tp)
        if alone_s is None:
            alone_s = self._alone_s[tp] = self.cost.step_s(tp, 1, 0)
        return max(self.config.tpot_margin, 0.5 + 0.5 * alone_s / tightest_s)

    def forget_times(self) -> None:
        """The cost model says otherwise by now: what was worked out with it is forgotten."""
        self._prefill_s.clear()
        self._alone_s.clear()

    def bearable(self, worker: Worker, tier: Tier, step_s: float) -> bool:
        """Whether a tier's time per token can be kept with decode steps that take so long."""
        return step_s * 1000 <= self.full(worker.tp, tier.tpot_ms / 1000) * tier.tpot_ms

    def keeps_out(self, worker: Worker, job: Job) -> bool:
        """Whether tiers are kept apart, and this instance is of other ones."""
        return self.config.tiers_apart and not worker.keeps(job)

    def fits(self, worker: Worker, job: Job) -> bool:
        """Whether there is room for a request's KV cache, with what all are expected to make."""
        need = job.target + (0 if worker.plan.role == PREFILL else job.expected_output + worker.growth_tokens())
        if worker.pages(int(need)) <= worker.free_blocks:
            return True
        # Alone it may take whatever there is.
        return worker.jobs == 0 and worker.pages(job.target + 1) <= worker.free_blocks

    def harmless(self, worker: Worker, job: Job) -> bool:
        """Whether a late request costs the others in the instance no target."""
        tightest_s = worker.tightest_tpot_s()
        if tightest_s == math.inf:
            return True
        count, context = len(worker.decoding) + len(worker.prefills) + 1, worker.context + job.target
        for other in worker.prefills:
            context += other.target
        return self.cost.step_s(worker.tp, count, context) <= self.full(worker.tp, tightest_s) * tightest_s

    def decode_s(self, worker: Worker, job: Job) -> float:
        """Seconds of a decode step with the request."""
        return self.cost.step_s(worker.tp, len(worker.decoding) + 1, worker.context + job.target)

    def work_s(self, worker: Worker, job: Job) -> float:
        """Time that an instance takes for a prompt and those that are more urgent, with nothing else to do."""
        ahead = 0
        if worker.prefills:
            rank = urgency(job)
            for other in worker.prefills:
                if not other.late and urgency(other) <= rank:
                    ahead += other.target - other.cached
        alone_s = self.prefill_s(worker.tp, job.target)
        if not ahead:
            return alone_s
        # Short ones share a step, long ones do not attend to each other.
        return min(alone_s + self.prefill_s(worker.tp, ahead), self.prefill_s(worker.tp, ahead + job.target))

    def spared_s(self, tp: int, tokens: int, known: int) -> float:
        """Time of a prefill that its first `known` tokens do not take; what follows attends to them all the same."""
        known = min(known, tokens - 1)
        whole_s = self.prefill_s(tp, tokens)
        rest_s = max(whole_s - self.prefill_s(tp, known), self.prefill_s(tp, tokens - known))
        return max(0.0, whole_s - rest_s)

    def kept_tpot_s(self, worker: Worker) -> float:
        """Least TPOT target of the tiers that an instance is kept for; infinite if it is for any."""
        return min((t.tpot_ms for t in self.tiers if t.name in worker.plan.tiers), default=math.inf) / 1000

    def ends_s(self, worker: Worker, job: Job, now_s: float) -> float:
        """Seconds until a late request would end in an instance, roughly."""
        step_s = self.decode_s(worker, job)
        prompts_s = self.prefill_s(worker.tp, worker.prefill_left + job.target)
        return (
            worker.busy_s(now_s)
            + prompts_s * (2 if worker.decoding else 1)
            + step_s * max(1.0, job.expected_output - job.generated)
        )

    def fast_enough(self, job: Job, workers: Sequence[Worker]) -> set[int]:
        """TPs of the instances that decode a request within its time per token, if it is alone there."""
        # Of one token there is no time per token.
        most_s = REACH * job.tier.tpot_ms / 1000 if job.expected_output > 1 else math.inf
        tokens = max(job.target, job.cached)  # one that a switch has parked has more than its prompt
        tps = {worker.tp for worker in workers if worker.takes_decodes}
        return {tp for tp in tps if self.cost.step_s(tp, 1, tokens) <= most_s}

    def reachable(self, job: Job, workers: Sequence[W], now_s: float, held: Mapping[W, int] | None = None) -> bool:
        """Whether some instance could meet a request's targets if nobody decoded there; in a switch, yes.

        Args:
          job: the request.
          workers: the instances.
          now_s: the time.
          held: tokens of its beginning that instances have.
        """
        if self.config.order == "fcfs" or any(worker.stopping for worker in workers):
            return True
        left_s = job.ttft_deadline_s - now_s if job.first_token_s is None else math.inf
        decodes = self.fast_enough(job, workers)
        if not decodes:
            return False
        for worker in workers:
            if not worker.serves_prompts or self.keeps_out(worker, job):
                continue
            if worker.plan.role == MIXED and worker.tp not in decodes:
                continue
            if worker.pages(job.target + 1) > worker.capacity_blocks:
                continue
            known = held.get(worker, 0) if held else 0
            spared_s = self.spared_s(worker.tp, job.target, known) if known else 0.0
            if worker.busy_s(now_s) + self.work_s(worker, job) - spared_s <= left_s:
                return True
        return False
