"""The engine's policy by latency tiers: `control.Scheduler`, with a control `Worker` for every instance.

Requests are `control` jobs, which read from the engine how far they have come; instances are `control` workers, kept up
to date by what the engine tells.  Two things differ from the model of a cell.  Steps are launched ahead of their
results, so token deadlines are judged by when the steps in flight are expected to end.  And a step of the engine has
one chunk at most, of a size that it was compiled for: the chunks that the scheduler composes beside a decode step, a
round, go before it one after the other.  The last one shares a step with it where the cell has such steps.

All but `push` and `now_s` runs on the engine's thread.  What other threads are to see of jobs and
workers is copied here first (`control.planning.cell_view`).
"""

import collections
import dataclasses
import heapq
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import PREFILL
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.scheduling import placement
from nitsum_jax.control.scheduling.forecast import TierForecast, forecast
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import Home, LiveRequest
from nitsum_jax.engine.policy import Policy, SeatTest
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.switching.migration import Destination, Leaving, SeatsLeft
from nitsum_jax.errors import OverloadedError
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.runtime.scheduling.live_worker import LiveJob, LiveWorker

JobListener = Callable[[float, JobView], None]
_LOOK_AGAIN_S = 0.25


class TieredScheduling(Policy):
    """See `engine.policy.Policy` for the calls of the engine.

    Attributes:
      scheduler: who decides.
      cost: what it predicts with.
      listeners: whom to tell of requests that came, and of those that ended by themselves: (time, the request then).
    """

    # ruff: noqa: D102
    def __init__(
        self,
        tiers: TierSet,
        cost: CostModel,
        capacity: int,
        *,
        admitted: Callable[[str, float], None] | None = None,
        time_scale: float = 1.0,
        config: SchedulerConfig = SchedulerConfig(),
        clock: Callable[[], float] = time.monotonic,
    ):
        """Knows no instance yet.

        Args:
          tiers: those that requests may name.
          cost: told what the engine's steps take.
          capacity: most requests that may wait.
          admitted: told id and time of every request that an instance takes, on the engine's thread.
          time_scale: seconds of the engine's clock for one of the tiers and the cost model (see
            `engine.batching.pacing`).
          config: of the scheduler.
          clock: that of the engine.
        """
        self.capacity = capacity
        self.cost = cost
        self._config = config
        self.scheduler: Scheduler[LiveJob, LiveWorker] = Scheduler(cost, tuple(tiers), config)
        self.arrived_listeners: list[JobListener] = []
        self.finished_listeners: list[JobListener] = []
        self._tiers = tiers
        self._admitted = admitted
        self._scale = time_scale
        self._clock = clock
        self._new: dict[LiveRequest, None] = {}  # in their order
        self._unseated: set[LiveRequest] = set()
        self._workers: dict[Instance, LiveWorker] = {}
        self._kept_for: dict[tuple[tuple[int, ...], Role], tuple[str, ...]] = {}
        self._offered: collections.deque[LiveJob] = collections.deque()
        self._stale: dict[LiveWorker, None] = {}  # something changed there: it may take another request
        self._look_for_late = False  # something changed: a late request may go somewhere
        self._wakes: list[float] = []
        self._indices = itertools.count()
        self._version = 0
        self._seen_s = 0.0
        self._looked_s = -math.inf

    # ---- for the server

    def begin(self, tiers: TierSet) -> None:
        """Forgets what earlier requests taught, and takes new targets for the same tiers; while no request is alive."""
        self._tiers = tiers
        self.scheduler = Scheduler(self.cost, tuple(tiers), self._config)

    def now_s(self) -> float:
        """The time on the clock of jobs and tiers."""
        return self._clock() / self._scale

    @property
    def time_scale(self) -> float:
        """Seconds of the engine's clock for one of the jobs' and tiers'."""
        return self._scale

    def workers(self) -> tuple[LiveWorker, ...]:
        """The instances in force; on the engine's thread."""
        return tuple(self._workers.values())

    def plan(self) -> Layout:
        """The instances in force, with the tiers that they are kept for."""
        return Layout(tuple(worker.plan for worker in self._workers.values()))

    def view(self, num_devices: int, lost: tuple[int, ...] = (), allowed: tuple[str, ...] = ()) -> CellView:
        """What a controller sees, made on the engine's thread for whatever thread."""
        workers = tuple(self._workers.values())
        return CellView.of(self.plan(), num_devices, workers, self.scheduler.backlog, lost=lost, allowed=allowed)

    def forecasts(self) -> list[TierForecast]:
        """What a usual request of each tier would get if it came now, in real seconds; on the engine's thread."""
        workers, now = tuple(self._workers.values()), self.now_s()
        found = [forecast(self.scheduler, workers, tier, now) for tier in self._tiers]
        return [one.scaled(self._scale) for one in found]

    def count_late(self, ids: Collection[str]) -> int:
        """How many of these requests are alive and late."""
        asked = set(ids)
        seated = (worker.members() for worker in self._workers.values())
        return sum(job.late and job.id in asked for job in itertools.chain(self.scheduler.backlog.jobs(), *seated))

    def keep_for(self, plan: Layout) -> None:
        """Says which tiers instances are kept for, those that are there and those that a switch will bring."""
        self._kept_for = {instance.group: instance.tiers for instance in plan.instances}
        for worker in self._workers.values():
            worker.plan = self._kept(worker.plan)

    # ---- the queue

    def __len__(self) -> int:
        return len(self._unseated)

    def push(self, sequence: LiveRequest) -> None:
        if len(self._unseated) >= self.capacity:
            raise OverloadedError(f"{self.capacity} requests wait already: try again later")
        request = sequence.request
        tier = self._tiers.get(request.tier).with_targets(request.ttft_ms, request.tpot_ms)
        sequence.job = LiveJob(sequence, tier, sequence.arrival_s / self._scale)
        self._unseated.add(sequence)
        self._new[sequence] = None

    def arrivals(self, now_s: float) -> Sequence[LiveRequest]:
        if not self._new:
            return ()
        arrived = list(self._new)
        self._new.clear()
        now = now_s / self._scale
        for sequence in arrived:
            job = _job(sequence)
            self.scheduler.admit(job, now)
            job.expected_output = min(job.expected_output, sequence.request.max_tokens)
            self._offered.append(job)
            seen = JobView.of(job)
            for listener in self.arrived_listeners:
                listener(now, seen)
        return arrived

    def waiting(self) -> Iterable[LiveRequest]:
        return [*self._new, *(job.sequence for job in self.scheduler.backlog.jobs())]

    def next(self, instances: Sequence[Instance], test: SeatTest, now_s: float) -> tuple[LiveRequest, Instance] | None:
        now = self._seen_s = now_s / self._scale
        self._wake(now)
        while self._offered:
            job = self._offered.popleft()
            held = self._held(job.sequence, test)
            worker = self.scheduler.first_worker(job, tuple(self._workers.values()), now, held)
            if worker is None or not test.fits(job.sequence, worker.instance):
                for time_s in self.scheduler.wakes(job, now):
                    heapq.heappush(self._wakes, time_s)
                self._look_for_late = True
                continue
            self.scheduler.backlog.remove(job)
            return job.sequence, worker.instance
        while self._stale:
            live = next(iter(self._stale))
            found = self.scheduler.pull(live, now) if live.instance in self._workers else None
            if found is not None and not test.fits(found.sequence, live.instance):
                self.scheduler.backlog.push(found)
                found = None
            self._look_for_late = True
            if found is not None:
                return found.sequence, live.instance
            del self._stale[live]
        return self._next_late(test, now) if self._look_for_late else None

    def _next_late(self, test: SeatTest, now: float) -> tuple[LiveRequest, Instance] | None:
        """A late request that goes somewhere now; asked once nothing in time does."""
        placed = self.scheduler.place_late(tuple(self._workers.values()), now)
        if placed is not None:
            job, worker = placed
            if test.fits(job.sequence, worker.instance):
                return job.sequence, worker.instance
            self.scheduler.backlog.push(job)
        self._look_for_late = False
        return None

    def _held(self, sequence: LiveRequest, test: SeatTest) -> dict[LiveWorker, int]:
        """Tokens of a sequence's beginning that lie at instances which could take it."""
        workers = [worker for worker in self._workers.values() if worker.takes_prompts]
        if len(workers) < 2:
            return {}  # nothing is to be chosen
        pages = {worker: test.held(sequence, worker.instance) for worker in workers}
        return {worker: count * worker.page_size for worker, count in pages.items() if count}

    def again(self, sequence: LiveRequest) -> None:
        job = _job(sequence)
        self.scheduler.readmit(job, self.now_s())
        self._offered.append(job)

    def remove(self, sequence: LiveRequest) -> None:
        job = _job(sequence)
        self._new.pop(sequence, None)
        if self.scheduler.backlog.remove(job) and job in self._offered:
            self._offered.remove(job)
        self._unseated.discard(sequence)

    def wake_s(self) -> float | None:
        if not len(self.scheduler.backlog):
            return None
        soon = self._seen_s + _LOOK_AGAIN_S
        return (min(soon, self._wakes[0]) if self._wakes else soon) * self._scale

    def _wake(self, now: float) -> None:
        due = len(self.scheduler.backlog) > 0 and now - self._looked_s >= _LOOK_AGAIN_S
        while self._wakes and self._wakes[0] <= now:
            heapq.heappop(self._wakes)
            due = True
        if due:
            self._looked_s = now
            self._stale.update(dict.fromkeys(self._workers.values()))

    # ---- steps

    def prefill(self, instance: Instance) -> PrefillChoice | None:
        worker = self._workers.get(instance)
        if worker is None:
            return PrefillChoice(instance.prefills[0])
        if worker.owed:
            if instance.owes_decode():
                return None
            worker.owed = False
        while worker.round and worker.round[0][0].sequence not in instance.prefills:
            worker.round.popleft()  # it has gone
        if not worker.round:
            self._compose(worker, instance)
        if not worker.round:
            return None
        job, tokens = worker.round[0]
        return PrefillChoice(job.sequence, tokens, joined=worker.begun, fused=len(worker.round) == 1)

    def _compose(self, worker: LiveWorker, instance: Instance) -> None:
        if self.cost.version != self._version:
            self._version = self.cost.version
            self.scheduler.forget_times()
        worker.begun = False
        chunks = self.scheduler.compose(worker, max(self.now_s(), worker.busy_until_s)) if worker.prefills else []
        worker.round.extend(chunks)
        if not chunks and not instance.owes_decode():  # whoever decodes is about to end; somebody must go on
            worker.round.append((_job(instance.prefills[0]), 256))

    def launched(self, instance: Instance, step: Step, now_s: float) -> None:
        worker = self._workers.get(instance)
        if worker is None:
            return
        now = now_s / self._scale
        self._stale[worker] = None
        if step.chunk is None:
            worker.launched(self.cost.step_s(worker.tp, step.decoding, step.context), now)
            worker.owed = False
            worker.advance(1)
            return
        if step.decoding:
            worker.launched(self.cost.step_s(worker.tp, step.decoding, step.context, (step.chunk,)), now)
            worker.advance(1)
        else:  # what it adds to the decode step of its round
            alone = self.cost.step_s(worker.tp, len(worker.decoding), worker.context) if worker.decoding else 0.0
            both = self.cost.step_s(worker.tp, len(worker.decoding), worker.context, (step.chunk,))
            worker.launched(both - alone, now)
        job = _job(step.sequences[0])
        if worker.round and worker.round[0][0] is job:
            left = worker.round[0][1] - step.chunk.tokens
            worker.round.popleft()
            if left > 0 and not step.emits[0]:
                worker.round.appendleft((job, left))
        worker.begun = True
        worker.owed = not worker.round and not step.decoding
        if step.emits[0]:
            if job.first_token_s is None:
                job.first_token_s = worker.busy_until_s  # as is expected; corrected when it comes
            if worker.plan.role == PREFILL:
                worker.depart(job)
            else:
                worker.begin_decode(job)

    def settled(self, instance: Instance, step: Step, now_s: float) -> None:
        worker = self._workers.get(instance)
        if worker is not None:
            worker.settled(now_s / self._scale)
            self._stale[worker] = None
        if step.tokens is not None:
            seconds = (step.ready_s - step.start_s) / self._scale
            chunks = () if step.chunk is None else (step.chunk,)
            self.cost.observe(instance.spec.tp, seconds, step.decoding, step.context, chunks)

    # ---- where sequences are

    def decode_at(self, sequence: LiveRequest, instances: Sequence[Instance], now_s: float) -> Instance | None:
        workers = [self._workers[instance] for instance in instances if instance in self._workers]
        worker = self.scheduler.decode_worker(_job(sequence), workers, now_s / self._scale)
        return None if worker is None else worker.instance

    def place(
        self, sequences: Sequence[Leaving], hosts: Sequence[Destination], room: Callable[[], SeatsLeft]
    ) -> list[int | None]:
        workers = [self._planned(number, host) for number, host in enumerate(hosts)]
        seats = self.scheduler.place([self._traveller(one.sequence) for one in sequences], workers, room)
        return [None if seat is None else seat.instance for seat in seats]

    def _planned(self, number: int, host: Destination) -> Worker:
        """An instance that a switch will bring."""
        return Worker(number, self._kept(host.spec), host.pages * host.page_size, host.page_size, host.rows)

    def _traveller(self, sequence: LiveRequest) -> placement.Traveller:
        job, home = _job(sequence), sequence.home
        assert home is not None
        waited = job.worker is not None and job.id in job.worker.outgoing
        return placement.Traveller(job, home.spec.devices, sequence.cached, not sequence.prefilling, waited)

    def victim(self, instance: Instance) -> LiveRequest:
        return self.scheduler.victim(map(_job, instance.rows.values())).sequence

    def seated(self, sequence: LiveRequest, instance: Instance, now_s: float) -> None:
        first = sequence in self._unseated
        self._unseated.discard(sequence)
        job = _job(sequence)
        worker = self._workers.get(instance)
        if worker is not None:
            worker.seat(job)
        if first and self._admitted is not None:
            self._admitted(job.id, now_s)

    def moved(self, sequence: LiveRequest, source: Instance, target: Instance) -> None:
        job = _job(sequence)
        if job.worker is not None:
            job.worker.drop(job)
        self._arrive(job, self._workers[target])
        for instance in (source, target):
            if instance in self._workers:
                self._stale[self._workers[instance]] = None

    def left(self, sequence: LiveRequest, home: Home) -> None:
        job = _job(sequence)
        if (worker := job.worker) is not None:
            worker.drop(job)
            self._stale[worker] = None

    def first_token(self, sequence: LiveRequest, now_s: float) -> None:
        job = _job(sequence)
        job.first_token_s = now_s / self._scale
        if job.first_token_s > job.ttft_deadline_s:
            job.give_up()
        if job.worker is not None:
            job.worker.retime(job)

    def ended(self, sequence: LiveRequest, now_s: float) -> None:
        job = _job(sequence)
        job.finish_s = now_s / self._scale
        if sequence.finish not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self.scheduler.ended(job)
        seen = JobView.of(job)
        for listener in self.finished_listeners:
            listener(job.finish_s, seen)

    def relaid(self, instances: Sequence[Instance], now_s: float) -> None:
        workers = {}
        for instance in instances:
            kept = self._workers.get(instance)
            workers[instance] = kept or self._make(instance)
        for worker in self._workers.values():
            for job in worker.members():
                if worker.instance not in workers or job.sequence.home is not worker.instance:
                    worker.drop(job)
        for worker in workers.values():
            for sequence in (*worker.instance.prefills, *worker.instance.rows.values()):
                job = _job(sequence)
                if job.worker is worker:
                    continue
                if sequence.prefilling:
                    worker.seat(job)
                else:
                    self._arrive(job, worker)
        self._workers = workers
        self._stale = dict.fromkeys(workers.values())

    def _arrive(self, job: LiveJob, worker: LiveWorker) -> None:
        if job.first_token_s is None:
            job.first_token_s = self.now_s()  # it comes any moment
        if worker.plan.role == PREFILL:  # a switch has put it there
            worker.park(job)
        else:
            worker.arrive(job)

    def _make(self, instance: Instance) -> LiveWorker:
        plan = self._kept(instance.spec)
        return LiveWorker(next(self._indices), plan, instance, instance.page_size, instance.max_batch)

    def _kept(self, spec: InstanceSpec) -> InstanceSpec:
        """An instance with the tiers that it is kept for."""
        return dataclasses.replace(spec, tiers=self._kept_for.get(spec.group, ()))


def _job(sequence: LiveRequest) -> LiveJob:
    """What this policy keeps of a request, from `push` on."""
    job: LiveJob = sequence.job
    return job
