"""A discrete-event model of a cell: what a scheduler's decisions would take on given devices.

Time advances from step to step.  An instance runs one step at a time: all its decoding requests and the prefill
chunks that the scheduler composes, or where the profile says that these share no step, first each of the chunks and
then a decode step.  The cost model says how long that takes.  Decode steps in a row, with no request
coming or going, are one event: their times follow a line (`CostModel.decode_segment`), so that nothing is
approximated.

The simulator drives it with traces, the planner with what it expects.  Pure: its clock is a number.
"""

import collections
import dataclasses
import heapq
import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import NamedTuple

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import PREFILL
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.meshes.layout import InstanceSpec, Layout

Span = tuple[int, int]  # of a prefill chunk: new tokens, context before them
MAX_BATCH = 256
"""Most requests of an instance, by default."""

_IN_TIME = operator.attrgetter("job.begin_s", "job.arrival_s", "job.id")
_LATE = operator.attrgetter("job.arrival_s", "job.id")


@dataclasses.dataclass(slots=True)
class StepRun:
    """Steps under way in an instance: one with prefill chunks, or `count` decode steps on a line.

    Attributes:
      start_s: when the first began.
      count: how many.
      first_s: time of the first.
      growth_s: how much longer each is than the one before.
      sequences: decoding requests.
      context: their KV tokens before the first.
      chunks: prefill chunks (then count is 1).
      counted: steps that are in the accounts of the instance already.
    """

    start_s: float
    count: int
    first_s: float
    growth_s: float
    sequences: int
    context: int
    chunks: list[tuple[ModelJob, int]]
    counted: int = 0

    def end_of(self, steps: int) -> float:
        """When so many of the steps are done."""
        return self.start_s + steps * self.first_s + self.growth_s * (steps * (steps - 1) // 2)

    @property
    def end_s(self) -> float:
        """When all are done."""
        return self.end_of(self.count)

    def spans(self) -> list[Span]:
        """Its prefill chunks, as long as they are not counted as cached."""
        return [(tokens, job.cached) for job, tokens in self.chunks]

    def steps(self) -> Iterator[tuple[float, float, int]]:
        """Start, end and KV tokens of the decoding requests of each step."""
        for step in range(self.count):
            yield self.end_of(step), self.end_of(step + 1), self.context + step * self.sequences

    def steps_by(self, now_s: float) -> int:
        """How many steps are done by now."""
        low, high = self.counted, self.count
        while low < high:
            middle = (low + high + 1) // 2
            if self.end_of(middle) <= now_s:
                low = middle
            else:
                high = middle - 1
        return low


class ModelWorker(Worker[ModelJob]):
    """An instance of the model: a worker and what it is doing."""

    def __init__(self, index: int, plan: InstanceSpec, capacity_tokens: int, page_size: int, max_batch: int):
        """As `Worker`."""
        super().__init__(index, plan, capacity_tokens, page_size, max_batch)
        self.run: StepRun | None = None
        self.version = 0  # of `run`: events of an older one are void
        self.incoming = 0  # requests whose KV cache is on its way here
        self.arrived: list[ModelJob] = []  # requests whose KV cache came during the steps under way
        self.sending = 0  # and from here
        self.idle_until = -math.inf  # a switch copies KV cache
        self.finishes: list[tuple[int, str, ModelJob]] = []  # (clock of the last token, id, job)
        # Where chunks are steps of their own: those before the next decode step, and whether that is due.
        self.round: collections.deque[tuple[ModelJob, int]] = collections.deque()
        self.owed = False

    def seat(self, job: ModelJob) -> None:
        """As `Worker`'s; the job notes it."""
        super().seat(job)
        job.visit(self.index)

    def park(self, job: ModelJob) -> None:
        """As `Worker`'s; the job notes it."""
        super().park(job)
        job.visit(self.index)

    def arrive(self, job: ModelJob) -> None:
        """As `Worker`'s; the job notes it."""
        super().arrive(job)
        job.visit(self.index)

    def leave(self, job: ModelJob) -> None:
        """As `Worker`'s; what a job has decoded here is counted now and not with every step."""
        if job.id in self.decoding:
            job.decoded(self.generated(job))
        super().leave(job)

    def busy_s(self, now_s: float) -> float:
        """Time until the step under way ends."""
        run = self.run
        if run is None:
            return max(0.0, self.idle_until - now_s)
        ends_s = run.end_s if run.count == 1 else run.end_of(min(run.steps_by(now_s) + 1, run.count))
        return max(0.0, ends_s - now_s)

    def steps_to_finish(self) -> int:
        """Decode steps until a request is done."""
        while self.finishes:
            clock, _, job = self.finishes[0]
            # One that was preempted may be here again, with its prompt.
            if self.decoding.get(job.id) is job and job.offset + job.output_tokens == clock:
                return clock - self.clock
            heapq.heappop(self.finishes)
        return 1 << 30


class Recorder:
    """Is told what happens; what is not overridden is of no interest.  See `sim` for one that writes logs."""

    def ran(self, worker: ModelWorker, run: StepRun) -> None:
        """An instance has made a row of steps (see `StepRun.steps`)."""

    def finished(self, job: ModelJob) -> None:
        """A request has its last token."""

    def failed(self, job: ModelJob, reason: str) -> None:
        """A request cannot be served."""


class Stranded(NamedTuple):
    """A request whose prompt is computed and that waits, where it was, for an instance to decode it."""

    job: ModelJob
    source: ModelWorker


class CellModel:
    """Instances, requests and events.

    Attributes:
      now_s: the time.
      plan: in force (a switch under way is not).
      workers: instances of the plan.
      alive: requests that have come and not ended, by id.
      preemptions: requests that lost their KV cache for want of room.
    """

    def __init__(
        self,
        cost: CostModel,
        scheduler: "Scheduler[ModelJob, ModelWorker]",
        plan: Layout,
        *,
        recorder: Recorder,
        max_batch: int = MAX_BATCH,
        resident_tp: int | None = None,
        now_s: float = 0.0,
    ):
        """Starts empty.

        Args:
          cost: what steps take.
          scheduler: decides.
          plan: the first one.
          recorder: is notified.
          max_batch: most requests of an instance.
          resident_tp: least TP whose weights all devices keep, so that switches move none; None: only those in use.
          now_s: the time at which it starts.
        """
        self.cost = cost
        self.scheduler = scheduler
        self.plan = plan
        self.now_s = now_s
        self.max_batch = max_batch
        self.resident_tp = resident_tp
        self.alive: dict[str, ModelJob] = {}
        self.preemptions = 0
        self._recorder = recorder
        self._mixed = cost.profile.mixed_steps
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._numbers = itertools.count()
        self._indices = itertools.count()
        self._stranded: list[Stranded] = []
        self.workers = [self.make_worker(instance) for instance in plan.instances]
        self.on_finish: Callable[[ModelJob], None] | None = None

    # ---- driving it

    def add(self, job: ModelJob) -> None:
        """A request comes now."""
        self.alive[job.id] = job
        self.scheduler.admit(job, self.now_s)
        self._offer(job)

    def at(self, time_s: float, call: Callable[..., None], *args: object) -> None:
        """Calls `call(*args)` at a time."""
        heapq.heappush(self._events, (time_s, next(self._numbers), call, args))

    def next_event_s(self) -> float:
        """When something happens next; infinite if nothing will."""
        return self._events[0][0] if self._events else math.inf

    def run_until(self, time_s: float) -> None:
        """Lets everything happen up to a time."""
        events = self._events
        while events and events[0][0] <= time_s:
            self.now_s, _, call, args = heapq.heappop(events)
            call(*args)
        if time_s != math.inf:
            self.now_s = max(self.now_s, time_s)

    def make_worker(self, instance: InstanceSpec) -> ModelWorker:
        """An empty instance."""
        return ModelWorker(
            next(self._indices),
            instance,
            self.cost.kv_capacity_tokens(instance.tp, self.resident_tp),
            self.cost.page_size,
            self.max_batch,
        )

    # ---- requests

    def settle(self) -> None:
        """Brings the accounts of instances amid a row of decode steps up to date, so that they can be read now."""
        for worker in self.workers:
            run = worker.run
            if run is not None and run.count > 1:
                done = min(run.steps_by(self.now_s), run.count - 1)
                worker.advance(done - run.counted)
                run.counted = done

    def _offer(self, job: ModelJob) -> None:
        self.settle()
        worker = self.scheduler.first_worker(job, self.workers, self.now_s)
        if worker is not None:
            self.scheduler.backlog.remove(job)
            self._seat(worker, job)
            self.nudge(worker)
            return
        self._place_late()
        # A request that is refused now may suit an instance of other tiers later, or be late.
        for time_s in self.scheduler.wakes(job, self.now_s):
            self.at(time_s, self._wake_idle)

    def _wake_idle(self) -> None:
        self.scheduler.backlog.demote(self.now_s)
        self._place_late()
        for worker in self.workers:
            if worker.run is None or not worker.run.chunks:
                self.nudge(worker)

    def _place_late(self, beginning: ModelWorker | None = None) -> None:
        """Lets late requests go where they can; `beginning` is at a step boundary and looks around itself."""
        if not len(self.scheduler.backlog):
            return
        self.settle()
        while (placed := self.scheduler.place_late(self.workers, self.now_s)) is not None:
            job, worker = placed
            self._seat(worker, job)
            if worker is not beginning:
                self.nudge(worker)

    def _seat(self, worker: ModelWorker, job: ModelJob) -> None:
        worker.seat(job)

    def nudge(self, worker: ModelWorker) -> None:
        """Has an instance look around: at once if it is idle, else after the step under way."""
        if worker.run is None:
            self._begin(worker)
        else:
            self.cut(worker)

    def cut(self, worker: ModelWorker) -> None:
        """Ends a row of decode steps after the one under way."""
        run = worker.run
        if run is None or run.chunks or run.count == 1:
            return
        done = min(run.steps_by(self.now_s) + 1, run.count)
        if done < run.count:
            run.count = done
            worker.version += 1
            self.at(run.end_s, self._end, worker, worker.version)

    # ---- steps

    def _begin(self, worker: ModelWorker) -> None:
        """At a step boundary: takes requests, then starts what is to be done."""
        if worker.stopping or worker.run is not None:
            return
        if worker.idle_until > self.now_s:
            return
        now, version = self.now_s, worker.version
        while (job := self.scheduler.pull(worker, now)) is not None:
            self._seat(worker, job)
        self._place_late(worker)
        if worker.version != version:  # a request that went there has it begun
            return
        count = len(worker.decoding)
        while count and (room := worker.steps_until_full()) < 1:
            self._preempt(worker)
            count = len(worker.decoding)
        chunks = self._chunks(worker) if worker.prefills else []
        if chunks:
            spans = [(tokens, job.cached) for job, tokens in chunks]
            count, context = (count, worker.context) if self._mixed else (0, 0)
            seconds = self.cost.step_s(worker.tp, count, context, spans)
            worker.run = StepRun(now, 1, seconds, 0.0, count, context, chunks)
        elif count:
            first, growth, limit = self.cost.decode_segment(worker.tp, count, worker.context)
            worker.owed = False
            steps = min(worker.steps_to_finish(), room, 1 + max(0, limit - worker.context) // count)
            if worker.prefills:
                steps = 1  # a prompt waits until there is time for it
            worker.run = StepRun(now, max(1, steps), first, growth * count, count, worker.context, [])
        else:
            return
        worker.version += 1
        self.at(worker.run.end_s, self._end, worker, worker.version)

    def _chunks(self, worker: ModelWorker) -> list[tuple[ModelJob, int]]:
        """Prefill chunks of the next step: all of a round, or one by one where they share no step with decoding."""
        if self._mixed:
            return self.scheduler.compose(worker, self.now_s)
        if worker.owed and worker.decoding:
            return []
        if not worker.round:
            worker.round.extend(self.scheduler.compose(worker, self.now_s))
        while worker.round:
            job, tokens = worker.round.popleft()
            worker.owed = not worker.round
            if job in worker.prefills:
                return [(job, tokens)]
        return []

    def _end(self, worker: ModelWorker, version: int) -> None:
        if worker.version != version or worker.run is None:
            return
        run, worker.run = worker.run, None
        self._recorder.ran(worker, run)
        if run.sequences:
            worker.advance(run.count - run.counted)
            while worker.steps_to_finish() <= 0:
                _, _, job = heapq.heappop(worker.finishes)
                worker.leave(job)
                self._finish(job)
        for job, tokens in run.chunks:
            if job.prefilled(tokens):
                self._prefilled(worker, job)
        if worker.arrived:
            for job in worker.arrived:
                worker.arrive(job)
                self._enter(worker, job)
            worker.arrived.clear()
        if self._stranded:
            self._retry_stranded()
        if worker.stopping:
            self._drained()
        else:
            self._begin(worker)

    def _prefilled(self, worker: ModelWorker, job: ModelJob) -> None:
        if job.first_token_s is None:
            job.first_token_s = self.now_s
            if self.now_s > job.ttft_deadline_s:
                job.give_up()
        if job.generated >= job.output_tokens:
            worker.leave(job)
            self._finish(job)
        elif worker.plan.role == PREFILL:
            worker.depart(job)
            self._hand_over(worker, job)
        else:
            worker.begin_decode(job)
            self._enter(worker, job)

    def _enter(self, worker: ModelWorker, job: ModelJob) -> None:
        clock = job.offset + job.output_tokens
        heapq.heappush(worker.finishes, (clock, job.id, job))

    def _finish(self, job: ModelJob) -> None:
        job.end(self.now_s)
        del self.alive[job.id]
        self._recorder.finished(job)
        if self.on_finish is not None:
            self.on_finish(job)

    def _preempt(self, worker: ModelWorker) -> None:
        victim = self.scheduler.victim(worker.decoding.values())
        if worker.jobs == 1:
            worker.leave(victim)
            del self.alive[victim.id]
            self._recorder.failed(victim, "its KV cache outgrew the instance")
            return
        worker.leave(victim)
        self.send_back(victim)

    def send_back(self, job: ModelJob) -> None:
        """A request has lost its KV cache: it is computed again, prompt and output so far."""
        self.preemptions += 1
        job.lose()
        self.scheduler.readmit(job, self.now_s)

    # ---- hand-over of a prefilled request

    def _hand_over(self, source: ModelWorker, job: ModelJob) -> None:
        self.settle()
        target = self.scheduler.decode_worker(job, self.workers, self.now_s)
        if target is None:
            self.strand(job, source)
            return
        target.reserve(job)
        target.incoming += 1
        source.sending += 1
        seconds = self.cost.transfer_s(job.cached, source.tp, target.tp)
        self.at(self.now_s + seconds, self._arrive, source, target, job)

    def strand(self, job: ModelJob, source: ModelWorker) -> None:
        """A request that is prefilled waits for an instance to decode it."""
        job.begin_s = _begin_s(job)
        self._stranded.append(Stranded(job, source))

    def _arrive(self, source: ModelWorker, target: ModelWorker, job: ModelJob) -> None:
        source.departed(job)
        source.sending -= 1
        self._join(target, job)
        if source.stopping:
            self._drained()
        else:
            self.nudge(source)

    def _join(self, target: ModelWorker, job: ModelJob) -> None:
        """A request for which pages were reserved has its KV cache here: it decodes from the next step on."""
        target.incoming -= 1
        if target.run is None:
            target.arrive(job)
            self._enter(target, job)
        else:  # the steps under way go without it
            target.arrived.append(job)
        if target.stopping:
            self._drained()
        else:
            self.nudge(target)

    def _retry_stranded(self) -> None:
        """Requests without an instance to decode try again: those that can wait least first, until one finds none.

        Late ones, the last in this order, are tried whatever the others found.
        """
        in_time = [one for one in self._stranded if not one.job.late]
        late = [one for one in self._stranded if one.job.late]
        self._stranded = []
        for waiting, order in ((in_time, _IN_TIME), (late, _LATE)):
            if len(waiting) > 1:
                waiting.sort(key=order)
            for i, (job, source) in enumerate(waiting):
                was_late, count = job.late, len(self._stranded)
                self._hand_over(source, job)
                if len(self._stranded) > count and job.late is was_late:
                    self._stranded += waiting[i + 1 :]
                    break

    def _drained(self) -> None:
        """An instance that was to stop has stopped; see `SwitchingCell`."""


def _begin_s(job: ModelJob) -> float:
    """By when about one that waits for an instance to decode has to begin."""
    tpot_s = job.tier.tpot_ms / 1000
    return job.next_token_due_s(job.generated) + 0.5 * tpot_s * max(4.0, job.expected_output - job.generated)
