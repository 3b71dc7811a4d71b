"""A target is a wish, never a gate: whatever the tiers ask for, work goes on.

Random tiers, also such as no instance can keep, random layouts and loads, against first come first served: one queue,
the least loaded instance, whole prompts, targets unknown.
"""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.cell import ModelWorker
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import SwitchingCell
from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout
from tests.control.cells import COST, Steps

FCFS = SchedulerConfig(order="fcfs", routing="least_loaded", chunk_tokens=8192, ahead_tokens=8192)
FLOOR_MS = COST.step_s(1, 1, 100) * 1000  # of a step at TP 1: no time per token below it can be kept


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    met: int
    tokens_per_s: float
    longest_wait_s: float
    idle: list[tuple[float, int]]


class _Watch(Steps):
    """Notes instances that idle while a request waits that they may run."""

    def __init__(self) -> None:
        super().__init__()
        self.idle: list[tuple[float, int]] = []


def _tiers(draw: random.Random, count: int) -> tuple[Tier, ...]:
    return tuple(Tier(f"t{i}", 10 ** draw.uniform(0.7, 4.8), 10 ** draw.uniform(0, 3)) for i in range(count))


def _plan(draw: random.Random, tiers: tuple[Tier, ...]) -> Layout:
    devices = draw.choice((1, 2, 4))
    plans = [homogeneous(devices, 1), homogeneous(devices, devices)]
    if devices > 1:
        plans.append(place([Shape(1, "prefill"), *[Shape(1, "decode")] * (devices - 1)], devices))
    if devices == 4:
        plans.append(place([Shape(2), Shape(1), Shape(1)], 4))
        plans.append(place([Shape(2, tiers=(tiers[0].name,)), Shape(1), Shape(1)], 4))
    return draw.choice(plans)


def _jobs(draw: random.Random, tiers: tuple[Tier, ...], devices: int, load: float, count: int) -> list[ModelJob]:
    """Requests of random lengths; a load of 1 is about what the devices can serve, infinity a burst."""
    prompt, output = 10 ** draw.uniform(1, 3.7), 10 ** draw.uniform(0.5, 2.5)
    work_s = COST.prefill_s(1, int(prompt)) + output * COST.step_s(1, 32, int(32 * (prompt + output))) / 32
    now, jobs = 0.0, []
    for number in range(count):
        now += 0.0 if load == math.inf else draw.expovariate(load * devices / work_s)
        lengths = max(1, int(draw.expovariate(1 / prompt))), max(2, int(draw.expovariate(1 / output)))
        jobs.append(ModelJob(str(number), draw.choice(tiers), now, *lengths))
    return jobs


def _serve(plan: Layout, tiers: tuple[Tier, ...], jobs: list[ModelJob], config: SchedulerConfig) -> Outcome:
    scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(COST, tiers, config)
    watch = _Watch()
    for tier in tiers:
        scheduler.expect_output(tier.name, sum(job.output_tokens for job in jobs) / len(jobs))
    cell = SwitchingCell(COST, scheduler, plan, recorder=watch)
    reach = {t.name for t in tiers if COST.step_s(min(s.tp for s in plan.shapes), 1, 100) * 1000 < 0.9 * t.tpot_ms}

    def look() -> None:
        """Nothing idles with work at hand: late requests may run anywhere, those in time where they do well."""
        for worker in cell.workers:
            if worker.run is not None or worker.jobs or not worker.takes_prompts:
                continue
            for job in scheduler.backlog.jobs():
                if job.late or (job.tier.name in reach and job.ttft_deadline_s - cell.now_s > 60):
                    watch.idle.append((cell.now_s, worker.index))

    for job in jobs:
        cell.run_until(job.arrival_s)
        cell.add(dataclasses.replace(job, instances=[]))
        look()
    while cell.next_event_s() < math.inf:
        cell.run_until(cell.next_event_s())
        look()
    assert len(watch.done) + len(watch.failures) == len(jobs), "a request was lost"
    ends = max(job.finish_s or 0.0 for job in watch.done)
    return Outcome(
        sum(job.met() for job in watch.done),
        sum(job.output_tokens for job in watch.done) / ends,
        max((job.first_token_s or math.inf) - job.arrival_s for job in watch.done),
        watch.idle,
    )


LOADS = (0.3, 0.6, 0.9, 1.5, 3.0, math.inf)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LOADS))
def test_no_instance_idles_beside_work_and_no_request_is_lost(seed: int, load: float) -> None:
    draw = random.Random(seed)
    tiers = _tiers(draw, draw.randint(1, 3))
    plan = _plan(draw, tiers)
    jobs = _jobs(draw, tiers, sum(s.tp for s in plan.shapes), load, 80)
    assert _serve(plan, tiers, jobs, SchedulerConfig()).idle == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(LOADS))
def test_one_tier_meets_as_many_targets_as_first_come_first_served(seed: int, load: float) -> None:
    """To 2 %, and three requests in 150 of luck; tokens per second to 5 %, unless more targets were met for them.

    Where instances differ in their TP a late request goes where it ends first, which others would share out better.
    """
    draw = random.Random(seed)
    tiers = _tiers(draw, 1)
    plan = _plan(draw, tiers)
    jobs = _jobs(draw, tiers, sum(s.tp for s in plan.shapes), load, 150)
    ours, plain = _serve(plan, tiers, jobs, SchedulerConfig()), _serve(plan, tiers, jobs, FCFS)
    assert ours.met >= 0.98 * plain.met - 3
    share = 0.95 if len(set(plan.shapes)) == 1 else 0.85
    assert ours.tokens_per_s >= share * plain.tokens_per_s or ours.met > plain.met or ours.met == len(jobs)


def test_many_tiers_meet_more_targets_than_first_come_first_served() -> None:
    """Over many random cells; in a few of them tiers are at odds that cannot both be served, and one is given up."""
    ours = plain = 0
    short = []
    for seed in range(60):
        draw = random.Random(seed)
        tiers = _tiers(draw, draw.randint(2, 3))
        plan = _plan(draw, tiers)
        jobs = _jobs(draw, tiers, sum(s.tp for s in plan.shapes), draw.choice(LOADS), 150)
        one, other = _serve(plan, tiers, jobs, SchedulerConfig()), _serve(plan, tiers, jobs, FCFS)
        ours, plain = ours + one.met, plain + other.met
        if one.met < 0.98 * other.met - 3:
            short.append(seed)
    assert ours > 1.1 * plain
    assert len(short) <= 2


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((0.9, 1.5, 3.0)))
def test_a_request_that_is_late_waits_no_longer_than_a_bound(seed: int, load: float) -> None:
    """Beside a stream of others for as long as that lasts: after its patience (30 s) it gets every eighth turn."""
    draw = random.Random(seed)
    tiers = (Tier("kept", 10 ** draw.uniform(2.5, 4), 10 ** draw.uniform(1.5, 3)), Tier("hopeless", 1, 1))
    plan = _plan(draw, tiers)
    stream: list[ModelJob] = []
    while not stream or (stream[-1].arrival_s < 60 and len(stream) < 2000):
        start_s = stream[-1].arrival_s if stream else 0.0
        for job in _jobs(draw, tiers[:1], sum(shape.tp for shape in plan.shapes), load, 100):
            stream.append(dataclasses.replace(job, id=str(len(stream)), arrival_s=start_s + job.arrival_s))
    late = ModelJob("late", tiers[1], 0.5 * stream[-1].arrival_s * draw.random(), draw.randint(1, 4000), 5)
    scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(COST, tiers)
    cell = SwitchingCell(COST, scheduler, plan, recorder=Steps())
    for job in sorted([*stream, late], key=lambda job: job.arrival_s):
        cell.run_until(job.arrival_s)
        cell.add(job)
    cell.run_until(math.inf)
    assert late.first_token_s is not None
    assert late.first_token_s - late.arrival_s < 1.5 * scheduler.config.patience_s


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("devices", [1, 4])
def test_targets_that_cannot_be_kept_cost_no_throughput(devices: int, load: float) -> None:
    """Every request is late at once, and all of them run as fast as if there were no targets."""
    tiers = (Tier("wish", ttft_ms=5000, tpot_ms=FLOOR_MS / 2), Tier("dream", ttft_ms=1, tpot_ms=1000))
    draw = random.Random(7)
    jobs = _jobs(draw, tiers, devices, load, 150)
    plan = homogeneous(devices, 1)
    ours, plain = _serve(plan, tiers, jobs, SchedulerConfig()), _serve(plan, tiers, jobs, FCFS)
    assert ours.tokens_per_s >= 0.95 * plain.tokens_per_s
    assert ours.longest_wait_s <= 1.5 * plain.longest_wait_s + 0.1


def test_an_idle_server_serves_at_once_whom_it_cannot_serve_in_time() -> None:
    """It waited for its whole TTFT target before: an instance that is too slow for its tokens did not take it."""
    slow = Tier("slow", ttft_ms=5000, tpot_ms=FLOOR_MS / 2)
    job = ModelJob("0", slow, 0.0, 100, 10)
    _serve(homogeneous(4, 1), (slow,), [job], SchedulerConfig())
    scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(COST, (slow,))
    steps = Steps()
    cell = SwitchingCell(COST, scheduler, homogeneous(4, 1), recorder=steps)
    cell.add(job)
    cell.run_until(math.inf)
    assert job.first_token_s is not None
    assert job.first_token_s < 2 * COST.prefill_s(1, 100)


def test_a_prompt_does_not_wait_for_others_to_end_their_decoding() -> None:
    """Beside streams that just keep their time per token, and with a cap that no step can keep."""
    tight = Tier("tight", ttft_ms=20, tpot_ms=1.02 * FLOOR_MS)
    plain = Tier("plain", ttft_ms=60_000, tpot_ms=2 * FLOOR_MS)
    steps = Steps()
    cell = SwitchingCell(COST, Scheduler(COST, (tight, plain)), homogeneous(1, 1), recorder=steps)
    for number in range(2):
        cell.add(ModelJob(str(number), plain, 0.0, 100, 3000))
    cell.run_until(1.0)
    short = ModelJob("short", plain, 1.0, 50, 5)
    cell.add(short)
    cell.run_until(math.inf)
    assert short.first_token_s is not None
    assert short.first_token_s - short.arrival_s < 1.0


def test_late_requests_go_where_they_end_first() -> None:
    """They piled up at the first instance before, whatever its load."""
    tier = Tier("hopeless", ttft_ms=1, tpot_ms=1)
    cell = SwitchingCell(COST, Scheduler(COST, (tier,)), homogeneous(4, 1), recorder=Steps())
    for number in range(16):
        cell.add(ModelJob(str(number), tier, 0.0, 2000, 200))
        cell.run_until(0.01 * number)
    cell.run_until(0.4)
    assert {worker.jobs for worker in cell.workers} == {4}


@pytest.mark.parametrize("first", [0, 1])
def test_a_late_request_decodes_where_it_ends_first(first: int) -> None:
    """After a hand-over, too: without anybody in time the load of every instance seemed to be nought."""
    tier = Tier("hopeless", ttft_ms=1, tpot_ms=1)
    plan = place([Shape(1, "prefill"), Shape(1, "decode"), Shape(1, "decode")], 3)
    cell = SwitchingCell(COST, Scheduler(COST, (tier,)), plan, recorder=Steps())
    for number in range(8):
        cell.add(ModelJob(str(number), tier, 0.0, 500, 400))
    cell.run_until(0.8)
    busy = [len(worker.decoding) for worker in cell.workers if worker.takes_decodes]
    assert sorted(busy) == [4, 4]
    assert cell.workers[0].plan.role == "prefill"
    assert busy[first] == 4
