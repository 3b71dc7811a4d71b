"""Runs a workload through the model of a cell under a policy.

The policies are those of `control`, called as a live server would call them: they learn of a request when it comes,
of its output length when it has ended, and decide on plans at the ticks of a controller.  The run is a function of
its arguments: two of the same agree bit for bit.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Protocol

import tqdm

from nitsum_jax.control.model.cell import MAX_BATCH, ModelWorker, Recorder, StepRun
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import Switched, SwitchingCell
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import Controller
from nitsum_jax.control.planning.decision import Decision
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

_CHECK_S = 5.0  # how often a run that may be given up is looked at


@dataclasses.dataclass(frozen=True)
class RunPolicy:
    """All that decides in a run.

    Attributes:
      name: what tables call it.
      plan: the first one, in force and compiled when the run begins.
      scheduler: settings of the scheduler.
      controller: makes a new controller; None: the plan stays as it is.
      resident_tp: least TP whose weights all devices keep, so that switches move none (it takes room from the KV
        cache); None: devices keep only the weights in use, as static plans do.
      device_put: switches reshard weights and KV cache by the general path, as without shared shards.
      allowed: layouts that the controller may use (see `CellView`); empty: all.
      timeouts: clients go when they have waited for their whole TTFT target and no instance has taken them.
    """

    name: str
    plan: Layout
    scheduler: SchedulerConfig = SchedulerConfig()
    controller: Callable[[], Controller] | None = None
    resident_tp: int | None = None
    device_put: bool = False
    allowed: tuple[str, ...] = ()
    timeouts: bool = False


class Log(Protocol):
    """Records what happens in a run."""

    # ruff: noqa: D102
    def ran(self, worker: ModelWorker, run: StepRun) -> None: ...
    def finished(self, job: ModelJob) -> None: ...
    def failed(self, job: ModelJob, reason: str) -> None: ...
    def switched(self, report: Switched) -> None: ...
    def decided(self, decision: Decision) -> None: ...


@dataclasses.dataclass(slots=True)
class RunOutcome:
    """What a run came to.

    Attributes:
      policy: its name.
      seconds: length of the workload.
      end_s: when the last request had ended.
      offered: requests that came.
      finished: jobs that ended, in the order of their ends; `met` says which count.
      failed: jobs that could not be served at all.
      switches: reports of all switches.
      decisions: how many a controller made.
      busy_s: device seconds spent in steps until the end of the workload, and after it.
      preemptions: requests that lost their KV cache.
      given_up: the run was ended early, as it would miss more than it was allowed to; its figures mean only that.
      missed: requests that were certain to miss then.
    """

    policy: str
    seconds: float
    end_s: float = 0.0
    offered: int = 0
    finished: list[ModelJob] = dataclasses.field(default_factory=list)
    failed: list[ModelJob] = dataclasses.field(default_factory=list)
    switches: list[Switched] = dataclasses.field(default_factory=list)
    decisions: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    given_up: bool = False
    missed: int = 0

    @property
    def met(self) -> int:
        """Requests that met both targets."""
        return sum(job.met() for job in self.finished)

    @property
    def attainment(self) -> float:
        """Share of the requests that met both targets; 1 if none came."""
        return self.met / self.offered if self.offered else 1.0

    @property
    def goodput(self) -> float:
        """Requests that met both targets, per second of the workload."""
        return self.met / self.seconds


def simulate(
    workload: Workload,
    tiers: TierSet,
    cost: CostModel,
    policy: RunPolicy,
    *,
    num_devices: int,
    log: Log | None = None,
    log_steps: bool = True,
    max_batch: int = MAX_BATCH,
    compile_s: float = 0.0,
    most_missed: int | None = None,
    progress: bool = False,
) -> RunOutcome:
    """Runs a workload to the end of its last request.

    Args:
      workload: what comes.
      tiers: targets of its tiers.
      cost: what steps, transfers and switches take.
      policy: decides.
      num_devices: devices of the cell.
      log: is notified of everything; None is faster.
      log_steps: whether it is notified of steps, of which there are many.
      max_batch: most requests of an instance.
      compile_s: compiling the executables of a device group takes this long the first time; the switch begins after it.
      most_missed: ends the run when more requests than this are certain to miss their targets.
      progress: shows a bar.

    Raises:
      InvalidInputError: the policy's plan does not fit the cell or the profile, or a tier is not known.
    """
    _check(workload, tiers, cost, policy, num_devices)
    driver = _Driver(workload, tiers, cost, policy, num_devices, log, log_steps, max_batch, compile_s)
    if not progress:
        return driver.run(most_missed, lambda _: None)
    with tqdm.tqdm(total=len(workload.requests), unit="req", desc=policy.name, leave=False) as bar:
        return driver.run(most_missed, bar.update)


def _check(workload: Workload, tiers: TierSet, cost: CostModel, policy: RunPolicy, num_devices: int) -> None:
    for tier in workload.tiers:
        tiers.get(tier)
    taken: set[int] = set()
    for instance in policy.plan.instances:
        if instance.tp not in cost.tps:
            have = ", ".join(map(str, cost.tps))
            raise InvalidInputError(f"{policy.name}: profile {cost.profile.name} has no TP {instance.tp}: use {have}")
        if not taken.isdisjoint(instance.devices) or not all(0 <= d < num_devices for d in instance.devices):
            raise InvalidInputError(f"{policy.name}: plan {policy.plan.unplaced} does not fit {num_devices} devices")
        taken.update(instance.devices)
    if not policy.plan.instances:
        raise InvalidInputError(f"{policy.name}: the plan has no instances")


class _Driver(Recorder):
    """One run."""

    def __init__(
        self,
        workload: Workload,
        tiers: TierSet,
        cost: CostModel,
        policy: RunPolicy,
        num_devices: int,
        log: Log | None,
        log_steps: bool,
        max_batch: int,
        compile_s: float,
    ):
        self.workload = workload
        self.policy = policy
        self.num_devices = num_devices
        self.compile_s = compile_s
        self.log = log
        self.step_log = log if log_steps else None
        self.outcome = RunOutcome(policy.name, workload.seconds, offered=len(workload.requests))
        self.by_name = {tier.name: tier for tier in tiers}
        self.scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(cost, tuple(tiers), policy.scheduler)
        self.cell = SwitchingCell(
            cost,
            self.scheduler,
            policy.plan,
            recorder=self,
            max_batch=max_batch,
            resident_tp=policy.resident_tp,
        )
        self.cell.device_put = policy.device_put
        self.cell.on_switch = self.switched
        self.controller = policy.controller() if policy.controller is not None else None
        self.urgent = False
        self.compiled = {instance.devices for instance in policy.plan.instances}

    # ---- driving

    def run(self, most_missed: int | None, advance: Callable[[int], object]) -> RunOutcome:
        cell, outcome, requests = self.cell, self.outcome, self.workload.requests
        tick_s = self.controller.interval_s if self.controller else math.inf
        check_s = _CHECK_S if most_missed is not None else math.inf
        i = shown = 0
        while True:
            arrival_s = requests[i].arrival_s if i < len(requests) else math.inf
            next_s = min(arrival_s, tick_s, check_s)
            if next_s is math.inf or (i == len(requests) and not cell.alive and not cell.switching):
                break
            cell.run_until(next_s)
            if arrival_s <= next_s:
                self._add(i, requests[i])
                i += 1
            elif tick_s <= next_s:
                assert self.controller is not None
                tick_s += self.controller.interval_s
                self._tick()
                if i == len(requests) and cell.next_event_s() == math.inf:
                    break
            else:
                check_s += _CHECK_S
                assert most_missed is not None
                outcome.missed = self._missed()
                if outcome.missed > most_missed:
                    outcome.given_up = True
                    break
                if cell.next_event_s() == math.inf and tick_s == math.inf and i == len(requests):
                    break
            if i - shown >= 200:
                advance(i - shown)
                shown = i
        if not outcome.given_up:
            cell.run_until(math.inf)
            for job in list(cell.alive.values()):
                self.failed(job, "no instance ever had room for it")
        advance(i - shown)
        outcome.end_s = cell.now_s
        outcome.preemptions = cell.preemptions
        return outcome

    def _add(self, number: int, request: TraceRequest) -> None:
        tier = self.by_name[request.tier]
        job = ModelJob(str(number), tier, request.arrival_s, request.prompt_tokens, request.output_tokens)
        if self.controller is not None:
            self.controller.arrived(request.arrival_s, JobView.of(job))
        self.cell.add(job)
        if self.policy.timeouts:
            self.cell.at(job.ttft_deadline_s, self._gone, job)
        self._look()

    def _gone(self, job: ModelJob) -> None:
        """A client goes if its request still waits for an instance."""
        if self.scheduler.backlog.remove(job):
            del self.cell.alive[job.id]
            self.failed(job, "its client waited no longer")

    def _look(self) -> None:
        """Lets the controller tick between its intervals if it finds that urgent."""
        if self.controller is not None and not self.urgent and self.controller.urgent(self.cell.now_s, self._late):
            self.urgent = True
            self.cell.at(self.cell.now_s, self._tick)

    def _tick(self) -> None:
        assert self.controller is not None
        self.urgent = False
        cell = self.cell
        if cell.switching:
            return
        cell.settle()
        view = CellView.of(
            cell.plan, self.num_devices, cell.workers, self.scheduler.backlog, allowed=self.policy.allowed
        )
        decision = self.controller.tick(cell.now_s, view)
        if decision is None:
            return
        self.outcome.decisions += 1
        if self.log is not None:
            self.log.decided(decision)
        if decision.switch:
            fresh = {instance.devices for instance in decision.choice.instances} - self.compiled
            self.compiled |= fresh
            cell.switch(decision.choice, self.compile_s if fresh else 0.0)

    def _late(self, ids: Collection[str]) -> int:
        """How many of these requests are alive and late."""
        alive = self.cell.alive
        return sum(alive[name].late for name in ids if name in alive)

    def _missed(self) -> int:
        """Requests that have missed their targets for certain."""
        now = self.cell.now_s
        lost = sum(not job.met() for job in self.outcome.finished) + len(self.outcome.failed)
        return lost + sum(job.first_token_s is None and job.ttft_deadline_s < now for job in self.cell.alive.values())

    # ---- notifications of the cell

    def ran(self, worker: ModelWorker, run: StepRun) -> None:
        self.outcome.busy_s += (run.end_s - run.start_s) * worker.tp
        if self.step_log is not None:
            self.step_log.ran(worker, run)

    def finished(self, job: ModelJob) -> None:
        self.outcome.finished.append(job)
        self.scheduler.ended(job)
        if self.controller is not None:
            self.controller.finished(self.cell.now_s, JobView.of(job))
            self._look()
        if self.log is not None:
            self.log.finished(job)

    def failed(self, job: ModelJob, reason: str) -> None:
        self.outcome.failed.append(job)
        if self.log is not None:
            self.log.failed(job, reason)

    def switched(self, report: Switched) -> None:
        self.outcome.switches.append(report)
        if self.log is not None:
            self.log.switched(report)
