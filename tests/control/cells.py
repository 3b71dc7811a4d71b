"""A small cell for tests: jobs, a recorder, and runs to the end."""

import dataclasses
import math
import random
from collections.abc import Sequence

from nitsum_jax.control.model.cell import ModelWorker, Recorder, Span, StepRun
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import SwitchingCell
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout
from tests.control.profiles import roofline_profile

CHAT = Tier("chat", ttft_ms=500, tpot_ms=25)
CODE = Tier("code", ttft_ms=5000, tpot_ms=200)
TIERS = (CHAT, CODE)
COST = CostModel(roofline_profile())


def small_cost(tokens_of_device: int) -> CostModel:
    """As COST, with hardly any room for KV cache."""
    profile = roofline_profile()
    tps = {
        tp: dataclasses.replace(times, kv_capacity_tokens=tokens_of_device * tp) for tp, times in profile.tps.items()
    }
    return CostModel(dataclasses.replace(profile, tps=tps))


@dataclasses.dataclass
class Steps(Recorder):
    """A recorder that keeps everything."""

    steps: list[tuple[int, tuple[int, ...], float, float, int, int, tuple[Span, ...]]] = dataclasses.field(
        default_factory=list
    )
    done: list[ModelJob] = dataclasses.field(default_factory=list)
    failures: list[tuple[ModelJob, str]] = dataclasses.field(default_factory=list)

    def ran(self, worker: ModelWorker, run: StepRun) -> None:
        """Keeps a row of steps."""
        for start_s, end_s, context in run.steps():
            self.step(worker, start_s, end_s, run.sequences, context, run.spans())

    def step(
        self, worker: ModelWorker, start_s: float, end_s: float, sequences: int, context: int, spans: Sequence[Span]
    ) -> None:
        """Keeps a step."""
        self.steps.append((worker.index, worker.plan.devices, start_s, end_s, sequences, context, tuple(spans)))

    def finished(self, job: ModelJob) -> None:
        """Keeps a job."""
        self.done.append(job)

    def failed(self, job: ModelJob, reason: str) -> None:
        """Keeps a failure."""
        self.failures.append((job, reason))


def job(number: int, tier: Tier = CHAT, arrival_s: float = 0.0, prompt: int = 500, output: int = 50) -> ModelJob:
    """A request."""
    return ModelJob(str(number), tier, arrival_s, prompt, output)


def some_jobs(count: int, rate: float, seed: int, *, prompt: int = 1500, output: int = 200) -> list[ModelJob]:
    """Requests of both tiers at random times."""
    draw = random.Random(seed)
    now = 0.0
    jobs = []
    for number in range(count):
        now += draw.expovariate(rate)
        tier = draw.choice(TIERS)
        jobs.append(job(number, tier, now, draw.randint(1, 2 * prompt), draw.randint(1, 2 * output)))
    return jobs


def make_cell(
    plan: Layout, cost: CostModel = COST, config: SchedulerConfig = SchedulerConfig(), **more: int
) -> tuple[SwitchingCell, Steps]:
    """A cell and its recorder."""
    steps = Steps()
    return SwitchingCell(cost, Scheduler(cost, TIERS, config), plan, recorder=steps, **more), steps


def serve(cell: SwitchingCell, jobs: Sequence[ModelJob], switches: Sequence[tuple[float, Layout]] = ()) -> None:
    """Lets the jobs come, the plans change, and all of them end."""
    for time_s, plan in switches:
        cell.at(time_s, _switch, cell, plan)
    for one in jobs:
        cell.run_until(one.arrival_s)
        cell.add(one)
    cell.run_until(math.inf)


def _switch(cell: SwitchingCell, plan: Layout) -> None:
    cell.switch(plan)
