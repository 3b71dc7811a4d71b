"""The model of a cell: rows of steps are what single steps would be, times are the cost model's, nothing is lost."""

import collections
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.cell import CellModel, ModelWorker, Recorder, StepRun
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from tests.control.cells import CHAT, COST, TIERS, Steps, job, make_cell, serve, small_cost, some_jobs

SPLIT = Layout((InstanceSpec((0, 1, 2, 3), Role.PREFILL), InstanceSpec((4, 5, 6, 7), Role.DECODE)))


class _OneByOne(CostModel):
    """Lines that end after one step: every decode step is an event of its own."""

    def decode_segment(self, tp: int, sequences: int, context_tokens: int) -> tuple[float, float, int]:
        seconds, slope, _ = super().decode_segment(tp, sequences, context_tokens)
        return seconds, slope, context_tokens


@pytest.mark.parametrize("plan", [homogeneous(8, 4), homogeneous(8, 1), SPLIT], ids=str)
@pytest.mark.parametrize("order", ["deadline", "fcfs"])
def test_rows_of_decode_steps_equal_stepping_one_by_one(plan: Layout, order: str) -> None:
    config = SchedulerConfig(order=order)
    rows, row_steps = make_cell(plan, config=config)
    serve(rows, some_jobs(120, 12.0, seed=3))
    single, single_steps = make_cell(plan, _OneByOne(COST.profile), config)
    serve(single, some_jobs(120, 12.0, seed=3))
    assert len(row_steps.steps) == len(single_steps.steps) > 1000
    for a, b in zip(sorted(row_steps.steps), sorted(single_steps.steps), strict=True):
        assert a[:2] == b[:2]
        assert a[4:] == b[4:]
        assert a[2:4] == pytest.approx(b[2:4], abs=1e-9)
    ends = {one.id: one.finish_s for one in single_steps.done}
    assert {one.id: one.finish_s for one in row_steps.done} == pytest.approx(ends, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 200), st.floats(1e-4, 0.1), st.floats(0, 1e-4), st.floats(0, 1))
def test_steps_by_counts_the_steps_that_ended(count: int, first_s: float, growth_s: float, share: float) -> None:
    run = StepRun(2.0, count, first_s, growth_s, 3, 100, [])
    now = 2.0 + share * (run.end_s - 2.0)
    ends = [end for _, end, _ in run.steps()]
    assert run.steps_by(now) == sum(end <= now for end in ends)
    assert ends[-1] == run.end_s
    assert [context for *_, context in run.steps()] == [100 + 3 * step for step in range(count)]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([homogeneous(8, 2), homogeneous(8, 8), SPLIT]), st.floats(2, 60))
def test_every_token_is_computed_once_and_every_step_takes_its_time(seed: int, plan: Layout, rate: float) -> None:
    cell, steps = make_cell(plan)
    jobs = some_jobs(60, rate, seed)
    serve(cell, jobs)
    assert len(steps.done) == len(jobs)
    assert cell.preemptions == 0
    assert sum(sequences for *_, sequences, _, _ in steps.steps) == sum(one.output_tokens - 1 for one in jobs)
    assert sum(new for *_, spans in steps.steps for new, _ in spans) == sum(one.prompt_tokens for one in jobs)
    last: dict[int, float] = collections.defaultdict(float)
    for index, devices, start_s, end_s, sequences, context, spans in steps.steps:
        assert start_s >= last[index] - 1e-9  # an instance does one thing at a time
        last[index] = end_s
        assert end_s - start_s == pytest.approx(COST.step_s(len(devices), sequences, context, spans), abs=1e-9)
    for worker in cell.workers:
        assert (worker.jobs, worker.used_blocks, worker.context) == (0, 0, 0)
    for one in steps.done:
        assert one.first_token_s is not None
        assert one.finish_s is not None
        assert one.arrival_s < one.first_token_s <= one.finish_s


def test_a_request_alone_takes_what_the_cost_model_says() -> None:
    cell, steps = make_cell(homogeneous(1, 1))
    one = job(0, prompt=300, output=5)
    serve(cell, [one])
    first = COST.step_s(1, 0, 0, [(300, 0)])
    assert one.first_token_s == pytest.approx(first)
    assert one.finish_s == pytest.approx(first + sum(COST.step_s(1, 1, 300 + made) for made in range(4)))
    assert len(steps.steps) == 5
    assert one.met()


def test_handed_over_requests_pay_for_the_transfer() -> None:
    cell, _ = make_cell(SPLIT)
    one = job(0, prompt=3000, output=2)
    serve(cell, [one])
    assert one.first_token_s is not None
    assert one.finish_s is not None
    transfer = COST.transfer_s(3000, 4, 4)
    assert one.finish_s - one.first_token_s == pytest.approx(transfer + COST.step_s(4, 1, 3000))
    assert one.instances == [0, 1]


def test_who_comes_during_decode_steps_is_not_credited_with_them() -> None:
    cell, steps = make_cell(SPLIT)
    jobs = [job(0, prompt=100, output=400), job(1, arrival_s=0.5, prompt=100, output=400)]
    serve(cell, jobs)
    decoded = sum(sequences for *_, sequences, _, _ in steps.steps)
    assert decoded == 2 * 399


def test_without_room_requests_are_preempted_and_finish_all_the_same() -> None:
    cost = small_cost(3000)
    cell, steps = make_cell(homogeneous(2, 1), cost)
    jobs = [job(i, prompt=400, output=600, arrival_s=0.01 * i) for i in range(12)]
    for one in jobs:  # the policy expects far less than comes
        cell.scheduler.expect_output(one.tier.name, 10)
    serve(cell, jobs)
    assert cell.preemptions > 0
    assert len(steps.done) == 12
    assert sum(one.recomputed for one in jobs) > 0
    assert all(worker.used_blocks == 0 for worker in cell.workers)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(600, 3000))
def test_who_is_preempted_makes_all_its_tokens(seed: int, room: int) -> None:
    """Short outputs among long ones: some come back to the instance that they had to leave before they were done."""
    draw = random.Random(seed)
    cell, steps = make_cell(homogeneous(2, 1), small_cost(room))
    jobs = [
        job(i, draw.choice(TIERS), prompt=draw.randint(20, 250), output=draw.randint(1, 300), arrival_s=0.02 * i)
        for i in range(25)
    ]
    for one in jobs:
        cell.scheduler.expect_output(one.tier.name, 5)
    serve(cell, jobs)
    decoded = sum(sequences for *_, sequences, _, _ in steps.steps)
    prefilled = sum(tokens for *_, spans in steps.steps for tokens, _ in spans)
    assert len(steps.done) == 25
    # A request that comes back computes prompt and output so far, the newest token included: that gives the next one.
    assert prefilled == sum(one.prompt_tokens + one.recomputed for one in jobs) + cell.preemptions
    assert decoded == sum(one.output_tokens - 1 for one in jobs) - cell.preemptions


def test_who_comes_back_to_an_instance_is_not_taken_for_decoding_there() -> None:
    cell, _ = make_cell(homogeneous(1, 1))
    (worker,) = cell.workers
    one = job(0, prompt=100, output=14)
    cell.alive[one.id] = one
    worker.seat(one)
    one.cached, one.first_token_s, one.generated = one.target, 0.0, 1
    worker.begin_decode(one)
    cell._enter(worker, one)
    assert worker.steps_to_finish() == 13
    worker.leave(one)
    one.target, one.cached = 101, 0
    worker.seat(one)
    assert worker.steps_to_finish() > 1000
    assert worker.tightest_tpot_s() == worker.slack_s(0.0) == math.inf
    assert not list(worker.overdue(100.0))


def test_what_never_fits_fails_and_is_told() -> None:
    cell, steps = make_cell(homogeneous(1, 1), small_cost(400))
    serve(cell, [job(0, prompt=300, output=500)])
    assert [(one.id, reason) for one, reason in steps.failures] == [("0", "its KV cache outgrew the instance")]
    assert not cell.alive


def test_max_batch_holds() -> None:
    class _Watched(Steps):
        most = 0

        def step(self, worker, start_s, end_s, sequences, context, spans) -> None:  # type: ignore[no-untyped-def]
            self.most = max(self.most, worker.jobs)
            super().step(worker, start_s, end_s, sequences, context, spans)

    steps = _Watched()
    cell = CellModel(COST, Scheduler(COST, TIERS), homogeneous(8, 8), recorder=steps, max_batch=5)
    for one in some_jobs(150, 200.0, seed=1):
        cell.at(one.arrival_s, cell.add, one)
    cell.run_until(math.inf)
    assert steps.most == 5
    assert len(steps.done) == 150


def test_runs_of_the_same_arguments_agree_bit_for_bit() -> None:
    def ends() -> list[tuple[str, float | None]]:
        cell, steps = make_cell(homogeneous(8, 2))
        serve(cell, some_jobs(200, 30.0, seed=7))
        return [(one.id, one.finish_s) for one in steps.done]

    assert ends() == ends()


def test_a_recorder_is_told_of_whole_rows_and_overrides_what_it_wants() -> None:
    class _Rows(Recorder):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def ran(self, worker: ModelWorker, run: StepRun) -> None:
            self.counts.append(run.count)

    rows = _Rows()
    cell = CellModel(COST, Scheduler(COST, TIERS), homogeneous(8, 8), recorder=rows)
    one: ModelJob = job(0, CHAT, output=100)
    cell.add(one)
    cell.run_until(math.inf)
    assert sum(rows.counts) == 100
    assert max(rows.counts) > 10
