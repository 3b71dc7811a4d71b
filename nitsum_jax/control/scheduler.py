"""Which request runs where and when, and what a step is made of.

Earliest deadline first over slack, with three rules on top:

- **Routing.** An instance takes a request only if it is predicted to meet both targets there, and if the targets of
  those that are there already still hold with it.  Tiers that the plan keeps an instance for go first; others may use
  what is left of it once they have waited a share of their time.
- **Token deadlines.** TPOT is a mean, so token k + 1 of a request is due `k * TPOT` after its first.  A step may take
  as long as the least time that is left to any decoding request; prefill chunks are cut to fit.  What a batch gains
  by being faster than its targets is hence spent on prompts (after Sarathi, arXiv 2403.02310, whose chunk size is
  fixed).
- **Demotion.** Who can no longer meet its targets is late: it goes on, behind all others, and costs none of them a
  deadline.  While more comes than can be served some are called late early, those with the most work first, so that
  the rest is in time (`shedding`).  Late ones that have waited `patience_s` get every `aging_every`-th turn, so nobody
  starves.

Pure: times come in, decisions go out.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from nitsum_jax.control.backlog import Backlog
from nitsum_jax.control.cost_model import CostModel
from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import DECODE, MIXED, PREFILL
from nitsum_jax.control.shedding import Drain
from nitsum_jax.control.worker import Worker

Chunk = tuple[Job, int]
_ANY = (math.inf, math.inf, "")  # more than any request's urgency: none has come at the end of time


@dataclasses.dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How a scheduler decides.

    Attributes:
      order: "deadline" (least slack first, with demotion) or "fcfs" (first come first served, nobody is late).
      chunk_tokens: prompt tokens and decodes in a step: None sizes chunks by token deadlines, a number is a fixed
        budget (Sarathi).
      routing: "predicted" (both targets must hold) or "least_loaded" (fewest tokens per device, whatever the targets).
      tiers_apart: a request never leaves the instances of its tier.
      max_chunk: most prompt tokens in a step.
      step_share: a step with prompts takes at most this share of the tightest TTFT target, so that who comes next does
        not wait long.
      tpot_margin: an instance takes a request if a decode step with it takes at most this share of the tightest TPOT.
      ttft_margin: share of a TTFT target that predictions may use.
      decode_margin: a request is handed over to an instance if a decode step with it takes at most this share of the
        tightest TPOT there;
      decode_most: or at most this share,
      decode_ahead: while those that decode there are ahead of their time per token by so many tokens on average;
      late_room: a late one is, if the step takes at most this share of what the fastest step leaves of that time.
      spill_after: an instance of other tiers may be used after this share of the TTFT target.
      spill_margin: and if a decode step there takes at most this share of the tightest TPOT of its own tiers.
      ahead_tokens: an instance takes another prompt when fewer prompt tokens than this are left to it.
      copy_share: what an instance must copy from another is taken to cost this share of computing it.
      look: requests of each tier that are considered, besides the first.
      shed_window_s: how fast a tier's requests leave the backlog is measured over so long, and those that will be late
        at this rate are given up early; 0: never.
      patience_s: see the module.
      aging_every: see the module.
    """

    order: str = "deadline"
    chunk_tokens: int | None = None
    routing: str = "predicted"
    tiers_apart: bool = False
    max_chunk: int = 8192
    step_share: float = 0.25
    tpot_margin: float = 0.92
    ttft_margin: float = 0.95
    decode_margin: float = 0.95
    decode_most: float = 1.1
    decode_ahead: float = 4.0
    late_room: float = 0.5
    spill_after: float = 0.4
    spill_margin: float = 0.8
    ahead_tokens: int = 512
    copy_share: float = 0.1
    look: int = 4
    shed_window_s: float = 1.0
    patience_s: float = 30.0
    aging_every: int = 8


class Scheduler:
    """The policy of one cell; it keeps the backlog and nothing else."""

    def __init__(self, cost: CostModel, tiers: Sequence, config: SchedulerConfig = SchedulerConfig()):
        """Makes a scheduler for these tiers (`control.tiers.Tier`)."""
        self.cost = cost
        self.config = config
        self.tiers = tuple(tiers)
        self.backlog = Backlog(by_arrival=config.order == "fcfs")
        self._turns = 0
        self._prefill_s: dict[tuple[int, int], float] = {}
        ttft = min(tier.ttft_ms for tier in tiers) / 1000
        self._step_cap_s = config.step_share * ttft
        self._expected = {tier.name: 128.0 for tier in tiers}
        sheds = config.order == "deadline" and config.shed_window_s > 0
        self._drains = {tier.name: Drain(config.shed_window_s) for tier in tiers} if sheds else {}
        self._shed_s = -math.inf

    # ---- knowledge

    def expect_output(self, tier: str, tokens: float) -> None:
        """Tells how long outputs of a tier are expected to be; requests that come from now on are judged by it."""
        self._expected[tier] = max(1.0, tokens)

    def prefill_s(self, tp: int, tokens: int) -> float:
        """Time to prefill so many tokens alone, to the next 64."""
        key = (tp, -(-tokens // 64))
        found = self._prefill_s.get(key)
        if found is None:
            found = self._prefill_s[key] = self.cost.prefill_s(tp, key[1] * 64)
        return found

    def forget_times(self) -> None:
        """The cost model says otherwise by now: what was worked out with it is forgotten."""
        self._prefill_s.clear()

    # ---- the backlog

    def admit(self, job: Job, now_s: float) -> None:
        """Takes a new request into the backlog."""
        job.expected_output = self._expected[job.tier.name]
        job.latest_start_s = job.ttft_deadline_s - self.prefill_s(self.cost.tps[-1], job.prompt_tokens)
        self.backlog.push(job)

    def readmit(self, job: Job, now_s: float) -> None:
        """Takes back a request that lost its KV cache; `target` and `cached` are set anew."""
        if job.first_token_s is None:
            job.latest_start_s = job.ttft_deadline_s - self.prefill_s(self.cost.tps[-1], job.target)
            job.late = job.late or job.latest_start_s < now_s
        else:  # it must catch up: urgent, unless it is lost anyway
            job.latest_start_s = now_s + self.prefill_s(self.cost.tps[-1], job.target)
        self.backlog.push(job)

    def first_worker(
        self, job: Job, workers: Sequence[Worker], now_s: float, held: Mapping[Worker, int] | None = None
    ) -> Worker | None:
        """The instance that should take a request that has just come, if one should take it now.

        Args:
          job: the request.
          workers: the instances.
          now_s: the time.
          held: tokens of its beginning whose KV cache lies in an instance already; none where it is not named.
        """
        held = held or {}
        most = max(held.values(), default=0)
        best, best_score = None, (math.inf, math.inf, math.inf)
        rank = _urgency(job)
        for worker in workers:
            before = self._turn(worker)
            if before is None or not rank < before:
                continue
            self._give_up_hopeless(worker, now_s)
            score = self._score(worker, job, now_s, held.get(worker, 0), most)
            if score is not None and score < best_score:
                best, best_score = worker, score
        if best is not None:
            self._took(job, now_s)
        return best

    def pull(self, worker: Worker, now_s: float) -> Job | None:
        """Takes the next request for an instance out of the backlog; None if there is none for it now."""
        self.backlog.demote(now_s)
        if now_s - self._shed_s >= self.config.shed_window_s / 4:
            self._shed(now_s)
        if not len(self.backlog) or not worker.takes_prompts or worker.jobs >= worker.max_batch:
            return None
        late = self.backlog.first_late()
        if late is not None and now_s - late.arrival_s >= self.config.patience_s:
            self._turns += 1
            if self._turns % self.config.aging_every == 0 and self._fits(worker, late) and not worker.prefills:
                self.backlog.remove(late)
                return late
        before = self._turn(worker)
        if before is not None:
            self._give_up_hopeless(worker, now_s)
            for job in self.backlog.heads(self.config.look):
                if _urgency(job) < before and self._score(worker, job, now_s) is not None:
                    self.backlog.remove(job)
                    self._took(job, now_s)
                    return job
        if late is not None and not worker.prefills and self._fits(worker, late) and self._harmless(worker, late):
            self.backlog.remove(late)
            return late
        return None

    def _took(self, job: Job, now_s: float) -> None:
        drain = self._drains.get(job.tier.name)
        if drain is not None:
            drain.took(now_s, job.work_s)

    def _shed(self, now_s: float) -> None:
        """Gives up those that will be late at the rate at which the backlog goes down."""
        self._shed_s = now_s
        for tier, drain in self._drains.items():
            if not self.backlog.waiting(tier):
                drain.ends()
                continue
            drain.begins(now_s)
            rate = drain.rate(now_s)
            if rate is not None and rate > 0:
                self.backlog.shed(tier, now_s, rate)

    def _turn(self, worker: Worker) -> tuple[float, float, str] | None:
        """How urgent a request must be for an instance to take it: less than this; None if it takes nobody.

        It is done enough with its prompts to take any, or should put this one first.
        """
        if not worker.takes_prompts or worker.jobs >= worker.max_batch:
            return None
        prefills = worker.prefills
        if not prefills or worker.prefill_left < self.config.ahead_tokens:
            return _ANY
        if len(prefills) >= 4 or self.config.order == "fcfs":
            return None
        return min([_urgency(other) for other in prefills if not other.late], default=_ANY)

    def _fits(self, worker: Worker, job: Job) -> bool:
        need = job.target + (0 if worker.plan.role == PREFILL else job.expected_output + worker.growth_tokens())
        if worker.pages(int(need)) <= worker.free_blocks:
            return True
        # Alone it may take whatever there is.
        return worker.jobs == 0 and worker.pages(job.target + 1) <= worker.free_blocks

    def _harmless(self, worker: Worker, job: Job) -> bool:
        """Whether a late request costs the others in the instance no target."""
        return self._decode_s(worker, job) <= self.config.tpot_margin * worker.tightest_tpot_s()

    def _decode_s(self, worker: Worker, job: Job) -> float:
        return self.cost.step_s(worker.tp, len(worker.decoding) + 1, worker.context + job.target)

    def _score(
        self, worker: Worker, job: Job, now_s: float, held: int = 0, most: int = 0
    ) -> tuple[float, float, float] | None:
        """How well the instance suits (less is better); None if it should not take the request now.

        Args:
          worker: the instance.
          job: the request.
          now_s: the time.
          held: tokens of its beginning that the instance has.
          most: that some instance has, from which the others can copy them.
        """
        config = self.config
        own = not worker.plan.tiers or job.tier.name in worker.plan.tiers
        if not own and config.tiers_apart:
            return None
        if not self._fits(worker, job):
            return None
        if config.routing == "least_loaded":
            return (0.0 if own else 1.0), (worker.context + worker.prefill_left) / worker.tp, worker.index
        decode_share = 0.0
        load = 0.0
        if worker.plan.role == MIXED:
            decode_s = self._decode_s(worker, job)
            # Who has lost its TPOT already would be admitted for nothing: it is late.
            tightest = min(job.tier.tpot_ms / 1000, worker.tightest_tpot_s())
            if not own:
                tightest = min(tightest, self._kept_tpot_s(worker) * config.spill_margin / config.tpot_margin)
            load = decode_s / tightest
            # By order of arrival nobody is late: who is refused today must be served tomorrow.
            if load > config.tpot_margin and (config.order == "deadline" or worker.decoding):
                return None
            decode_share = load if worker.decoding else 0.0
        rank = _urgency(job)
        ahead = 0
        for other in worker.prefills:
            if not other.late and _urgency(other) <= rank:
                ahead += other.target - other.cached
        work_s = self.prefill_s(worker.tp, job.target) + (self.prefill_s(worker.tp, ahead) if ahead else 0.0)
        spared_s = self._spared_s(worker.tp, job.target, held) if held else 0.0
        copied_s = (self._spared_s(worker.tp, job.target, most) if most > held else spared_s) - spared_s
        work_s -= spared_s  # a promise counts on what is there
        if job.first_token_s is None and config.order == "deadline":
            left_s = job.ttft_deadline_s - now_s - (1 - config.ttft_margin) * job.tier.ttft_ms / 1000
            if work_s > left_s:
                return None
        if not own:
            waited = now_s - job.arrival_s
            if waited < config.spill_after * (job.latest_start_s - job.arrival_s) or worker.prefills:
                return None
            if any(self.backlog.waiting(tier) for tier in worker.plan.tiers):
                return None
        work_s -= (1 - config.copy_share) * copied_s
        return (0.0 if own else 1.0), work_s / max(0.05, 1 - decode_share), load

    def _spared_s(self, tp: int, tokens: int, known: int) -> float:
        """Time of a prefill that its first `known` tokens do not take; what follows attends to them all the same."""
        known = min(known, tokens - 1)
        whole_s = self.prefill_s(tp, tokens)
        rest_s = max(whole_s - self.prefill_s(tp, known), self.prefill_s(tp, tokens - known))
        return max(0.0, whole_s - rest_s)

    def _kept_tpot_s(self, worker: Worker) -> float:
        return min((t.tpot_ms for t in self.tiers if t.name in worker.plan.tiers), default=math.inf) / 1000

    # ---- steps

    def compose(self, worker: Worker, now_s: float) -> list[Chunk]:
        """The prefill chunks of the next step; all decoding requests get a token beside them."""
        if not worker.prefills:
            return []
        if self.config.chunk_tokens is not None:
            return self._fixed_chunks(worker)
        count, context, tp = len(worker.decoding), worker.context, worker.tp
        budget_s = self._step_cap_s
        decode_s = 0.0
        if count:
            decode_s = self.cost.step_s(tp, count, context)
            self._give_up_lost(worker, now_s, decode_s)
            budget_s = min(budget_s, worker.slack_s(now_s))
        chunks: list[Chunk] = []
        spans: list[tuple[int, int]] = []
        left = self.config.max_chunk
        for job in sorted(worker.prefills, key=_urgency) if len(worker.prefills) > 1 else worker.prefills:
            want = min(job.target - job.cached, left)
            tokens = self._largest(tp, count, context, spans, job.cached, want, budget_s)
            if tokens < min(32, want):
                break
            chunks.append((job, tokens))
            spans.append((tokens, job.cached))
            left -= tokens
            if tokens < job.target - job.cached or left <= 0:
                break
        if not chunks and not count:  # a whole step exceeds the cap even for little: go on all the same
            job = min(worker.prefills, key=_urgency)
            chunks = [(job, min(job.target - job.cached, 256))]
        return chunks

    def _largest(
        self, tp: int, count: int, context: int, spans: list[tuple[int, int]], before: int, want: int, budget_s: float
    ) -> int:
        step_s = self.cost.chunk_line(tp, count, context, before, spans)
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

    def _fixed_chunks(self, worker: Worker) -> list[Chunk]:
        left = max(1, (self.config.chunk_tokens or 0) - len(worker.decoding))
        chunks = []
        for job in sorted(worker.prefills, key=self._fixed_order):
            tokens = min(job.target - job.cached, left)
            chunks.append((job, tokens))
            left -= tokens
            if left <= 0:
                break
        return chunks

    def _fixed_order(self, job: Job) -> tuple[float, float, str]:
        return (job.arrival_s, 0.0, job.id) if self.config.order == "fcfs" else _urgency(job)

    def _give_up_hopeless(self, worker: Worker, now_s: float) -> None:
        """Calls those late for whose time per token an instance is too slow, before they keep anybody out of it.

        A switch may leave them there.
        """
        if worker.plan.role == MIXED and worker.decoding and self.config.order == "deadline":
            decode_s = self.cost.step_s(worker.tp, len(worker.decoding), worker.context)
            if decode_s > worker.tightest_tpot_s():
                self._give_up_lost(worker, now_s, decode_s)

    def _give_up_lost(self, worker: Worker, now_s: float, decode_s: float) -> None:
        """Calls those late whose mean time per token cannot come down to the target any more."""
        for job in worker.overdue(now_s + decode_s):
            tpot_s = job.tier.tpot_ms / 1000
            generated = worker.generated(job)
            behind_s = now_s + decode_s - job.next_token_due_s(generated)
            remaining = max(4.0, job.expected_output - generated, 0.5 * generated)
            if behind_s > remaining * max(0.0, tpot_s - decode_s):
                job.late = True

    # ---- hand-over and switches

    def decode_worker(self, job: Job, workers: Sequence[Worker], now_s: float) -> Worker | None:
        """Where a request whose prompt is computed should decode; None if it should stay where it is for now.

        That is so where there is no room, and where a step with it would take longer than those in time allow: it
        waits as long as it can still catch up, is late then, and goes on once that harms nobody.
        """
        found, load, step_s = self._least_loaded(job, workers)
        if found is None or self.config.order == "fcfs" or self._bears(found, load, step_s, job.late, now_s):
            return found
        if not job.late:
            if self._can_wait(job, now_s, step_s):
                return None
            job.late = True
            found, load, step_s = self._least_loaded(job, workers)
        if found is None or self._bears(found, load, step_s, job.late, now_s) or self._must_go(job, now_s):
            return found
        return None

    def _bears(self, worker: Worker, load: float, step_s: float, late: bool, now_s: float) -> bool:
        """Whether those who decode in an instance can bear steps that take this share of their time per token.

        For a while they can bear more than all of it, if on average they are ahead of it.
        """
        if not worker.decoding:
            return True
        if late:
            least = load * self.cost.step_s(worker.tp, 1, 0) / step_s
            return load <= least + self.config.late_room * (1 - least)
        if load <= self.config.decode_margin:
            return True
        if load > self.config.decode_most:
            return False
        ahead = count = 0.0
        for other in worker.decoding.values():
            if not other.late and other.first_token_s is not None:
                tpot_s = other.tier.tpot_ms / 1000
                ahead += (other.first_token_s - now_s) / tpot_s + worker.generated(other)
                count += 1
        return ahead >= self.config.decode_ahead * count

    def _least_loaded(self, job: Job, workers: Sequence[Worker]) -> tuple[Worker | None, float, float]:
        """The instance that suits best for decoding, how full a step with the request is there, and its seconds."""
        best, best_score = None, (math.inf, math.inf, math.inf)
        best_s = 0.0
        for worker in workers:
            if not worker.takes_decodes or len(worker.decoding) >= worker.max_batch:
                continue
            need = job.cached + job.expected_output + worker.growth_tokens()
            if worker.pages(int(need)) > worker.free_blocks and (
                worker.jobs or worker.pages(job.cached + 1) > worker.free_blocks
            ):
                continue
            own = not worker.plan.tiers or job.tier.name in worker.plan.tiers
            if not own and self.config.tiers_apart:
                continue
            tightest = min(math.inf if job.late else job.tier.tpot_ms / 1000, worker.tightest_tpot_s())
            step_s = self.cost.step_s(worker.tp, len(worker.decoding) + 1, worker.context + job.cached)
            load = step_s / tightest
            if worker.plan.role != DECODE:
                load += 0.25  # its prompts come in between
            score = (0.0 if load <= self.config.decode_margin else 1.0), (0.0 if own else 1.0), load
            if score < best_score:
                best, best_score, best_s = worker, score, step_s
        return best, best_score[2], best_s

    def _can_wait(self, job: Job, now_s: float, step_s: float) -> bool:
        """Whether a request could still catch up if it decoded a moment from now."""
        if job.first_token_s is None:  # it comes any moment
            return True
        remaining = max(4.0, job.expected_output - job.generated)
        tpot_s = job.tier.tpot_ms / 1000
        behind_s = now_s + step_s - job.next_token_due_s(job.generated)
        return behind_s <= remaining * (tpot_s - step_s) if step_s < tpot_s else False

    def _must_go(self, job: Job, now_s: float) -> bool:
        """Whether a late request has waited its time, or keeps others from the room that it takes."""
        if now_s - job.arrival_s >= self.config.patience_s + job.tier.ttft_ms / 1000:
            return True
        source = job.worker
        return source is not None and source.free_blocks < 0.25 * source.capacity_blocks


def _urgency(job: Job) -> tuple[float, float, str]:
    return (math.inf if job.late else job.latest_start_s), job.arrival_s, job.id
