"""What a step is made of: the prefill chunks beside its decoding requests.

TPOT is a mean, so token k + 1 of a request is due `k * TPOT` after its first.  A step may take as long as the least
time that is left to any decoding request; chunks are cut to fit, and to a share of the tightest TTFT target, so that a
prompt that comes meanwhile does not wait long.  Both are wishes: a tier that cannot be served at all caps nothing, nor
does a cap that a step without prompts nearly fills, and a prompt that has had no chunk for a while gets one whatever is
due.

Pure: times come in, decisions go out.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.scheduling.scheduler_config import SchedulerConfig
from nitsum_jax.control.scheduling.urgency import urgency
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier

J = TypeVar("J", bound=Job)
Chunk = tuple[J, int]
LEAST = 32
"""Fewer prompt tokens than this are not worth a chunk, unless they are the last ones."""
_UNBOUND = 256  # tokens of a chunk that no time allows and that comes all the same


class Chunks:
    """Cuts prompts into chunks."""

    def __init__(self, cost: CostModel, config: SchedulerConfig, tiers: Sequence[Tier]):
        """Makes steps for instances to which requests of these tiers may come.

        Args:
          cost: what steps take.
          config: of the scheduler.
          tiers: all of the cell.
        """
        self._cost = cost
        self._config = config
        self._tiers = tiers
        self._caps: dict[int, float] = {}

    def forget_times(self) -> None:
        """The cost model says otherwise by now: what was worked out with it is forgotten."""
        self._caps.clear()

    def _cap_s(self, tp: int) -> float:
        """Longest step with prompts, for the sake of the tightest tier that can be served at all at this TP."""
        found = self._caps.get(tp)
        if found is None:
            alone_s = self._cost.step_s(tp, 1, 0)
            kept = [t.ttft_ms / 1000 for t in self._tiers if alone_s <= min(t.tpot_ms, t.ttft_ms) / 1000]
            found = self._caps[tp] = self._config.step_share * min(kept, default=math.inf)
        return found

    def compose(
        self, worker: Worker[J], now_s: float, give_up_lost: Callable[[Worker[J], float, float], None]
    ) -> list[Chunk[J]]:
        """The prefill chunks of the next step; all decoding requests get a token beside them.

        Args:
          worker: the instance.
          now_s: when the step begins.
          give_up_lost: calls those late whose time per token cannot be kept if a decode step takes so long; they are
            not waited for.
        """
        if not worker.prefills:
            return []
        if self._config.chunk_tokens is not None:
            return self._fixed(worker)
        count, context, tp = len(worker.decoding), worker.context, worker.tp
        alone_s = self._cost.step_s(tp, max(1, count), context)
        budget_s = max(self._cap_s(tp), self._config.cap_floor * alone_s)
        if count:
            give_up_lost(worker, now_s, alone_s)
            budget_s = min(budget_s, worker.slack_s(now_s))
        chunks = self._within(worker, budget_s)
        if not chunks and (not count or worker.starved_s(now_s) >= self._config.starve_s):
            job = min(worker.prefills, key=urgency)
            chunks = [(job, min(job.target - job.cached, _UNBOUND))]
        if chunks:
            worker.hungry_s = now_s
        return chunks

    def _within(self, worker: Worker[J], budget_s: float) -> list[Chunk[J]]:
        """The most urgent prompts' chunks with which a step takes at most so long."""
        count, context, tp = len(worker.decoding), worker.context, worker.tp
        chunks: list[Chunk[J]] = []
        spans: list[tuple[int, int]] = []
        left = self._config.max_chunk
        for job in sorted(worker.prefills, key=urgency) if len(worker.prefills) > 1 else worker.prefills:
            want = min(job.target - job.cached, left)
            tokens = self._largest(tp, count, context, spans, job.cached, want, budget_s)
            if tokens < min(LEAST, want):
                break
            chunks.append((job, tokens))
            spans.append((tokens, job.cached))
            left -= tokens
            if tokens < job.target - job.cached or left <= 0:
                break
        return chunks

    def _largest(
        self, tp: int, count: int, context: int, spans: list[tuple[int, int]], before: int, want: int, budget_s: float
    ) -> int:
        step_s = self._cost.chunk_line(tp, count, context, before, spans)
        if step_s(want) <= budget_s:
            return want
        low, high = 0, want
        while high - low > max(8, low >> 5):  # to 3 %: a finer search costs more than it brings
            middle = (low + high) // 2
            if step_s(middle) <= budget_s:
                low = middle
            else:
                high = middle
        return low

    def _fixed(self, worker: Worker) -> list[Chunk[J]]:
        left = max(1, (self._config.chunk_tokens or 0) - len(worker.decoding))
        chunks = []
        for job in sorted(worker.prefills, key=self._fixed_order):
            tokens = min(job.target - job.cached, left)
            chunks.append((job, tokens))
            left -= tokens
            if left <= 0:
                break
        return chunks

    def _fixed_order(self, job: Job) -> tuple[float, float, str]:
        return (job.arrival_s, 0.0, job.id) if self._config.order == "fcfs" else urgency(job)
