"""Which request runs where and when, and what a step is made of.

Earliest deadline first over slack, with three rules on top:

- **Routing.** An instance takes a request in time if it is predicted to meet both targets there, and if the targets of
  those that are there already still hold with it.  Tiers that the plan keeps an instance for go first; others may use
  what is left of it once they have waited a share of their time, or at once where nothing else is to be done.
- **Token deadlines.** A step may take as long as the least time that is left to any decoding request (`chunks`).  What
  a batch gains by being faster than its targets is spent on prompts (after Sarathi, arXiv 2403.02310, whose chunk size
  is fixed).
- **Demotion.** A request that can no longer meet its targets is late, and one that no instance could serve in time even
  if it were empty is late at once.  It waits for nothing but room: it goes where it ends first, as soon as that costs
  no request in time a target.  While more comes than can be served some are called late early, those with the most
  work first, so that the rest is in time (`shedding`).  Late ones that have waited `patience_s` get every
  `aging_every`-th turn whatever it costs, so nobody starves.

A target is a wish, never a gate: no instance idles while something waits that could run there and still do well, or
could do well nowhere.

Pure: times come in, decisions go out.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from nitsum_jax.control.job import Job
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import DECODE, MIXED
from nitsum_jax.control.planning.estimate import OutputLengths
from nitsum_jax.control.scheduling.backlog import Backlog
from nitsum_jax.control.scheduling.chunks import Chunk, Chunks
from nitsum_jax.control.scheduling.placement import Seat, Traveller, Vacancies, seats
from nitsum_jax.control.scheduling.predictions import REACH, Predictions
from nitsum_jax.control.scheduling.scheduler_config import SchedulerConfig
from nitsum_jax.control.scheduling.shedding import Drain
from nitsum_jax.control.scheduling.urgency import ANY, Urgency, urgency
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier

_JUST_AFTER_S = 1e-6

J = TypeVar("J", bound=Job)
W = TypeVar("W", bound=Worker)


class Scheduler(Generic[J, W]):
    """The policy of one cell, whose requests are all of one kind of job and its instances of one kind of worker.

    It keeps the backlog, and what it has learnt of output lengths.
    """

    def __init__(self, cost: CostModel, tiers: Sequence[Tier], config: SchedulerConfig = SchedulerConfig()):
        """Makes a scheduler for these tiers."""
        self.cost = cost
        self.config = config
        self.tiers = tuple(tiers)
        self.backlog: Backlog[J] = Backlog(by_arrival=config.order == "fcfs")
        self._turns = 0
        self.predict = Predictions(cost, self.tiers, config)
        self._chunks = Chunks(cost, config, self.tiers)
        self._outputs = OutputLengths(tier.name for tier in tiers)
        self._told: dict[str, float] = {}
        sheds = config.order == "deadline" and config.shed_window_s > 0
        self._drains = {tier.name: Drain(config.shed_window_s) for tier in tiers} if sheds else {}
        self._shed_s = -math.inf

    # ---- knowledge

    def expect_output(self, tier: str, tokens: float) -> None:
        """Tells how long outputs of a tier are, which are then not learnt; for requests that come from now on."""
        self._told[tier] = tokens

    def ended(self, job: Job) -> None:
        """A request ended by itself: others of its tier are expected to make as many tokens."""
        self._outputs.ended(job.tier.name, job.generated)

    def expected_output(self, tier: str) -> float:
        """How many tokens a request of a tier is expected to make."""
        told = self._told.get(tier)
        return max(1.0, self._outputs.expected(tier) if told is None else told)

    def forget_times(self) -> None:
        """The cost model says otherwise by now: what was worked out with it is forgotten."""
        self.predict.forget_times()
        self._chunks.forget_times()

    # ---- the backlog

    def admit(self, job: J, now_s: float) -> None:
        """Takes a new request into the backlog."""
        job.expected_output = self.expected_output(job.tier.name)
        job.due_s = job.ttft_deadline_s
        job.latest_start_s = job.due_s - self.predict.prefill_s(self.cost.tps[-1], job.prompt_tokens)
        self.backlog.push(job)

    def readmit(self, job: J, now_s: float) -> None:
        """Takes back a request that lost its KV cache; `target` and `cached` are set anew."""
        prefill_s = self.predict.prefill_s(self.cost.tps[-1], job.target)
        if job.first_token_s is None:
            job.due_s = job.ttft_deadline_s
            if job.due_s - prefill_s < now_s:
                job.give_up()
        else:  # it must catch up: urgent, unless it is lost anyway
            job.due_s = now_s + 2 * prefill_s
        job.latest_start_s = job.due_s - prefill_s
        self.backlog.push(job)

    def wakes(self, job: Job, now_s: float) -> list[float]:
        """When to look again at a request that no instance takes now: once others may, and once it is late."""
        if job.late:
            return []
        spill_s = job.arrival_s + self.config.spill_after * (job.latest_start_s - job.arrival_s)
        return [time_s + _JUST_AFTER_S for time_s in (spill_s, job.latest_start_s) if time_s > now_s]

    @staticmethod
    def victim(jobs: Iterable[J]) -> J:
        """Who of an instance gives up its KV cache for want of room: late ones first, then who came last."""
        return max(jobs, key=lambda job: (job.late, job.arrival_s, job.id))

    def first_worker(self, job: J, workers: Sequence[W], now_s: float, held: Mapping[W, int] | None = None) -> W | None:
        """The instance that should take a request that has just come, if one should take it now.

        Args:
          job: the request.
          workers: the instances.
          now_s: the time.
          held: tokens of its beginning whose KV cache lies in an instance already; none where it is not named.
        """
        held = held or {}
        most = max(held.values(), default=0)
        best: W | None = None
        best_score = (math.inf, math.inf, math.inf)
        rank = urgency(job)
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
        elif not job.late and not self.predict.reachable(job, workers, now_s, held):
            self.backlog.give_up(job)
        return best

    def pull(self, worker: Worker[J], now_s: float) -> J | None:
        """Takes the next request in time for an instance out of the backlog; None if there is none for it now."""
        self.backlog.demote(now_s)
        if now_s - self._shed_s >= self.config.shed_window_s / 4:
            self._shed(now_s)
        if not self.backlog.in_time:
            return None
        before = self._turn(worker)
        if before is None:
            return None
        self._give_up_hopeless(worker, now_s)
        for job in self.backlog.heads(self.config.look):
            if not urgency(job) < before:
                continue
            suits = self._score(worker, job, now_s) is not None
            if suits or (self._outvoted(worker, job, now_s) and self._score(worker, job, now_s) is not None):
                self.backlog.remove(job)
                self._took(job, now_s)
                return job
        return None

    def _outvoted(self, worker: Worker, job: Job, now_s: float) -> bool:
        """Gives up those whose tight time per token would make more others late, by keeping them waiting.

        Returns:
          Whether it did.
        """
        if worker.plan.role != MIXED or not worker.decoding or self.config.order == "fcfs":
            return False
        bearable = self.predict.bearable
        step_s = self.predict.decode_s(worker, job)
        stay_s = worker.growth_tokens() / len(worker.decoding) * step_s
        if job.latest_start_s - now_s > stay_s or not bearable(worker, job.tier, step_s):
            return False
        tight = [o for o in worker.decoding.values() if not o.late and not bearable(worker, o.tier, step_s)]
        kept_out = sum(
            tier.weight * self.backlog.due_by(tier.name, now_s + stay_s)
            for tier in self.tiers
            if bearable(worker, tier, step_s)
        )
        if not tight or kept_out <= sum(other.tier.weight for other in tight):
            return False
        for other in tight:
            other.give_up()
        return True

    def place_late(self, workers: Sequence[W], now_s: float) -> tuple[J, W] | None:
        """Takes a late request out of the backlog, and says which instance takes it: where it ends first.

        It goes to no instance where it would cost a request in time a target, unless it has waited for its patience
        and this is its turn.

        Args:
          workers: the instances.
          now_s: the time.

        Returns:
          None if there is none that can go now.
        """
        if not len(self.backlog):
            return None
        if self.backlog.in_time and any(not worker.jobs and worker.takes_prompts for worker in workers):
            self._give_up_unreachable(workers, now_s)
        waiting = list(itertools.islice(self.backlog.late(), self.config.look))
        if not waiting:
            return None
        turn = False
        if now_s - waiting[0].arrival_s >= self.config.patience_s:
            self._turns += 1
            turn = self._turns % self.config.aging_every == 0
        able = [worker for worker in workers if self._takes_late(worker)]
        for job in waiting if able else ():
            best, best_s = None, math.inf
            for worker in able:
                if self.predict.keeps_out(worker, job) or not self.predict.fits(worker, job):
                    continue
                if not (turn and not worker.prefills) and not self.predict.harmless(worker, job):
                    continue
                ends_s = self.predict.ends_s(worker, job, now_s)
                if ends_s < best_s:
                    best, best_s = worker, ends_s
            if best is not None:
                self.backlog.remove(job)
                return job, best
            turn = False
        return None

    def _takes_late(self, worker: Worker) -> bool:
        """Whether an instance has time for another prompt of a late request: one after the other, while any is in time.

        Several at once would fill it before those in time that are about to come.
        """
        if not worker.takes_prompts or worker.jobs >= worker.max_batch:
            return False
        if not worker.prefills:
            return True
        if self.backlog.in_time or worker.prefill_left >= self.config.ahead_tokens:
            return False
        return worker.tightest_tpot_s() == math.inf and all(other.late for other in worker.prefills)

    def _give_up_unreachable(self, workers: Sequence[Worker], now_s: float) -> None:
        """Calls those late, of the first ones, that no instance could serve in time: they wait for nothing."""
        for job in list(self.backlog.heads(self.config.look)):
            if not self.predict.reachable(job, workers, now_s):
                self.backlog.give_up(job)

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

    def _turn(self, worker: Worker) -> Urgency | None:
        """How urgent a request must be for an instance to take it: less than this; None if it takes nobody.

        It is done enough with its prompts to take any, or should put this one first.
        """
        if not worker.takes_prompts or worker.jobs >= worker.max_batch:
            return None
        prefills = worker.prefills
        if not prefills or worker.prefill_left < self.config.ahead_tokens:
            return ANY
        if len(prefills) >= 4 or self.config.order == "fcfs":
            return None
        return min([urgency(other) for other in prefills if not other.late], default=ANY)

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
        own = worker.keeps(job)
        if not own and config.tiers_apart:
            return None
        if not self.predict.fits(worker, job):
            return None
        if config.routing == "least_loaded":
            return (0.0 if own else 1.0), (worker.context + worker.prefill_left) / worker.tp, worker.index
        decode_share = 0.0
        load = 0.0
        if worker.plan.role == MIXED:
            decode_s = self.predict.decode_s(worker, job)
            # Who has lost its TPOT already would be admitted for nothing: it is late.
            tightest = min(job.tier.tpot_ms / 1000, worker.tightest_tpot_s())
            if not own:
                tightest = min(tightest, self.predict.kept_tpot_s(worker) * config.spill_margin / config.tpot_margin)
            load = decode_s / tightest
            # By order of arrival nobody is late: who is refused today must be served tomorrow.
            margin = self.predict.full(worker.tp, tightest) if worker.jobs else REACH
            if load > margin and (config.order == "deadline" or worker.decoding):
                return None
            decode_share = load if worker.decoding else 0.0
        spared_s = self.predict.spared_s(worker.tp, job.target, held) if held else 0.0
        copied_s = (self.predict.spared_s(worker.tp, job.target, most) if most > held else spared_s) - spared_s
        work_s = self.predict.work_s(worker, job) - spared_s  # a promise counts on what is there
        busy_s = worker.busy_s(now_s)
        if job.first_token_s is None and config.order == "deadline":
            margin_s = (1 - config.ttft_margin) * job.tier.ttft_ms / 1000 if worker.prefills else 0.0
            if busy_s + work_s > job.ttft_deadline_s - now_s - margin_s:
                return None
        if not own and worker.jobs:
            waited = now_s - job.arrival_s
            if waited < config.spill_after * (job.latest_start_s - job.arrival_s) or worker.prefills:
                return None
            if any(self.backlog.waiting(tier) for tier in worker.plan.tiers):
                return None
        work_s -= (1 - config.copy_share) * copied_s
        return (0.0 if own else 1.0), busy_s + work_s / max(0.05, 1 - decode_share), load

    # ---- steps

    def compose(self, worker: Worker[J], now_s: float) -> list[Chunk[J]]:
        """The prefill chunks of the next step; all decoding requests get a token beside them."""
        return self._chunks.compose(worker, now_s, self._give_up_lost)

    def _give_up_hopeless(self, worker: Worker, now_s: float) -> None:
        """Calls those late for whose time per token an instance is too slow, before they keep anybody out of it.

        A switch may leave them there.
        """
        if worker.decoding and self.config.order == "deadline":
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
                job.give_up()

    # ---- hand-over and switches

    def place(
        self, travellers: Sequence[Traveller], instances: Sequence[Worker], room: Callable[[], Vacancies]
    ) -> list[Seat | None]:
        """Where those go whose instances a switch takes away; None: computed again (see `placement`)."""
        return seats(self.cost, travellers, instances, room)

    def decode_worker(self, job: Job, workers: Sequence[W], now_s: float) -> W | None:
        """Where a request whose prompt is computed should decode; None if it should stay where it is for now.

        That is so where there is no room, and where a step with it would take longer than those in time allow: it
        waits as long as it can still catch up, is late then, and goes on once that harms nobody.
        """
        if self.config.order == "deadline" and not job.late and not self.predict.fast_enough(job, workers):
            job.give_up()
        found, load, step_s = self._least_loaded(job, workers)
        if found is None or self.config.order == "fcfs" or self._bears(found, load, step_s, job.late, now_s):
            return found
        if not job.late:
            if self._can_wait(job, now_s, step_s):
                return None
            job.give_up()
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

    def _least_loaded(self, job: Job, workers: Sequence[W]) -> tuple[W | None, float, float]:
        """The instance that suits best for decoding, how full a step with the request is there, and its seconds."""
        best: W | None = None
        best_score: tuple[float, ...] = (math.inf,) * 4
        best_load = best_s = 0.0
        for worker in workers:
            if not worker.takes_decodes or len(worker.decoding) >= worker.max_batch:
                continue
            need = job.cached + job.expected_output + worker.growth_tokens()
            if worker.pages(int(need)) > worker.free_blocks and (
                worker.jobs or worker.pages(job.cached + 1) > worker.free_blocks
            ):
                continue
            own = worker.keeps(job)
            if not own and self.config.tiers_apart:
                continue
            tightest = min(math.inf if job.late else job.tier.tpot_ms / 1000, worker.tightest_tpot_s())
            step_s = self.cost.step_s(worker.tp, len(worker.decoding) + 1, worker.context + job.cached)
            load = step_s / tightest
            if worker.plan.role != DECODE:
                load += 0.25  # its prompts come in between
            # Where a late one harms nobody, it goes where it ends first.
            score = (
                (0.0 if load <= self.config.decode_margin else 1.0),
                (0.0 if own else 1.0),
                (step_s if job.late and tightest == math.inf else load),
                step_s,
            )
            if score < best_score:
                best, best_score, best_load, best_s = worker, score, load, step_s
        return best, best_load, best_s

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
