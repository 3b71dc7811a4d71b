"""What controllers and planners see of a cell: numbers that do not change any more.

A live cell is controlled from another thread than the one that runs it.  Workers, jobs and the backlog belong to that
one; it makes these copies, so that what a controller works with never changes under its hands.  The model of a cell
makes them in the same way.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Sequence

from nitsum_jax.control.job import Job
from nitsum_jax.control.scheduling.backlog import Backlog
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.meshes.layout import InstanceSpec, Layout

_WAITING = 400  # waiting requests in a view, at most


@dataclasses.dataclass(frozen=True, slots=True)
class JobView:
    """A request at one moment.

    Attributes:
      id: unique among those alive.
      tier: name.
      arrival_s: when it came.
      prompt_tokens: length of the prompt.
      left_tokens: that are still to be computed before it can decode.
      expected_output: what the scheduler expects of it, tokens.
      generated: output tokens so far.
      late: it can no longer meet its targets.
      met: it has ended and met both.
    """

    id: str
    tier: str
    arrival_s: float
    prompt_tokens: int
    left_tokens: int
    expected_output: float
    generated: int
    late: bool
    met: bool

    @classmethod
    def of(cls, job: Job) -> "JobView":
        """That of a job now."""
        left = max(0, job.target - job.cached)
        return cls(
            job.id,
            job.tier.name,
            job.arrival_s,
            job.prompt_tokens,
            left,
            job.expected_output,
            job.generated,
            job.late,
            job.met(),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerView:
    """An instance at one moment.

    Attributes:
      plan: devices, role and tiers.
      jobs: requests that it has.
      decoding: how many of them get a token a step.
      context: tokens of KV cache of these together.
      prefill_left: prompt tokens that are still to be computed.
      tightest_tpot_s: least TPOT target of the decoding ones that are not late; infinite without any.
      used_share: of its KV cache.
      max_batch: most requests that it takes.
    """

    plan: InstanceSpec
    jobs: int
    decoding: int
    context: int
    prefill_left: int
    tightest_tpot_s: float
    used_share: float
    max_batch: int

    @property
    def tp(self) -> int:
        """Its TP."""
        return self.plan.tp

    @classmethod
    def of(cls, worker: Worker) -> "WorkerView":
        """That of a worker now."""
        return cls(
            worker.plan,
            worker.jobs,
            len(worker.decoding),
            worker.context,
            worker.prefill_left,
            worker.tightest_tpot_s(),
            (worker.capacity_blocks - worker.free_blocks) / max(1, worker.capacity_blocks),
            worker.max_batch,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class CellView:
    """A cell at one moment.

    Attributes:
      plan: in force.
      num_devices: of the cell.
      workers: its instances.
      waiting: requests in time that have no first token yet, in the backlog or prefilling, those that came first first,
        up to a number.
      backlog: requests that no instance has taken.
      backlog_tokens: that are to be computed for those of them that are in time.
      lost: devices that cannot be used.
      allowed: layouts that may be used (see `PlanInputs`); empty: all.
    """

    plan: Layout
    num_devices: int
    workers: tuple[WorkerView, ...] = ()
    waiting: tuple[JobView, ...] = ()
    backlog: int = 0
    backlog_tokens: int = 0
    lost: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        plan: Layout,
        num_devices: int,
        workers: Sequence[Worker],
        backlog: Backlog,
        *,
        lost: tuple[int, ...] = (),
        allowed: tuple[str, ...] = (),
    ) -> "CellView":
        """That of a cell now; on the thread that runs it."""
        jobs = itertools.chain(backlog.jobs(), *(worker.prefills for worker in workers))
        waiting = (job for job in jobs if not job.late and job.first_token_s is None and job.target > job.cached)
        first = heapq.nsmallest(_WAITING, waiting, key=lambda job: (job.arrival_s, job.id))
        return cls(
            plan,
            num_devices,
            tuple(map(WorkerView.of, workers)),
            tuple(map(JobView.of, first)),
            len(backlog),
            sum(job.target for job in backlog.jobs() if not job.late),
            lost,
            allowed,
        )
