"""The scheduler's rules, one by one, and that nobody starves."""

import math

import pytest

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.scheduling.scheduler import Scheduler, SchedulerConfig
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from tests.control.cells import CHAT, CODE, COST, TIERS, job, make_cell, serve, some_jobs


def _scheduler(config: SchedulerConfig = SchedulerConfig()) -> Scheduler:
    return Scheduler(COST, TIERS, config)


def _worker(tp: int = 1, tiers: tuple[str, ...] = (), index: int = 0) -> Worker:
    plan = InstanceSpec(tuple(range(tp)), Role.MIXED, tiers)
    return Worker(index, plan, COST.kv_capacity_tokens(tp), COST.page_size, 64)


def _decoding(worker: Worker, count: int, first_s: float, tier: object = CHAT, prompt: int = 500) -> None:
    for number in range(count):
        one = job(1000 + number, tier, prompt=prompt, output=200)  # type: ignore[arg-type]
        worker.seat(one)
        one.cached, one.first_token_s, one.generated = one.target, first_s, 1
        worker.begin_decode(one)


def test_the_most_urgent_request_goes_first() -> None:
    scheduler, worker = _scheduler(), _worker()
    relaxed, tight = job(0, CODE), job(1, CHAT, 0.2)
    scheduler.admit(relaxed, 0.0)
    scheduler.admit(tight, 0.2)
    assert scheduler.pull(worker, 0.2) is tight
    assert scheduler.pull(worker, 0.2) is relaxed


def test_first_come_first_served_takes_the_first() -> None:
    scheduler, worker = _scheduler(SchedulerConfig(order="fcfs")), _worker()
    relaxed, tight = job(0, CODE), job(1, CHAT, 0.2)
    scheduler.admit(relaxed, 0.0)
    scheduler.admit(tight, 0.2)
    assert scheduler.pull(worker, 0.2) is relaxed


def test_an_instance_refuses_whom_it_would_fail() -> None:
    scheduler = _scheduler()
    long = job(0, CHAT, prompt=60_000)
    scheduler.admit(long, 0.0)
    assert COST.prefill_s(1, 60_000) > 0.5
    busy = _worker(1)
    _decoding(busy, 1, 0.0)
    assert scheduler.first_worker(long, [busy], 0.0) is None
    crowded = _worker(1)
    _decoding(crowded, 46, 0.0, CODE, prompt=8000)
    assert COST.step_s(1, 47, crowded.context) > CHAT.tpot_ms / 1000
    tight = job(1, CHAT)
    scheduler.admit(tight, 0.0)
    assert scheduler.first_worker(tight, [crowded], 0.0) is None
    relaxed = job(2, CODE)
    scheduler.admit(relaxed, 0.0)
    assert scheduler.first_worker(relaxed, [crowded], 0.0) is crowded


@pytest.mark.parametrize("waits", [False, True])
def test_who_is_too_fast_for_an_instance_keeps_nobody_out_of_it(waits: bool) -> None:
    """A switch may leave requests in an instance that is too slow for them."""
    fast = Tier("fast", ttft_ms=500, tpot_ms=1000 * COST.step_s(1, 1, 1000) / 2)
    scheduler: Scheduler[ModelJob, Worker] = Scheduler(COST, (fast, *TIERS))
    worker = _worker()
    _decoding(worker, 3, 0.0, fast)
    left_over = list(worker.decoding.values())
    relaxed = job(0, CODE, 1.0)
    scheduler.admit(relaxed, 1.0)
    taken = scheduler.pull(worker, 1.0) if waits else scheduler.first_worker(relaxed, [worker], 1.0)
    assert taken is (relaxed if waits else worker)
    assert all(one.late for one in left_over)


def test_own_instances_come_before_those_of_other_tiers() -> None:
    scheduler = _scheduler()
    own, other, idle = _worker(1, ("chat",), 0), _worker(8, ("code",), 1), _worker(8, ("code",), 2)
    _decoding(other, 1, 0.0, CODE)
    one = job(0, CHAT)
    scheduler.admit(one, 0.0)
    assert scheduler.first_worker(one, [own, other], 0.0) is own
    # Others may be used once a share of the time is up, or if they have nothing to do, unless the tiers are kept apart.
    later = one.arrival_s + 0.5 * (one.latest_start_s - one.arrival_s)
    assert scheduler.first_worker(one, [other], 0.0) is None
    assert scheduler.first_worker(one, [other], later) is other
    assert scheduler.first_worker(one, [other, idle], 0.0) is idle
    apart = _scheduler(SchedulerConfig(tiers_apart=True))
    apart.admit(one, 0.0)
    assert apart.first_worker(one, [other, idle], later) is None


def test_of_instances_that_suit_the_one_goes_first_that_knows_the_beginning() -> None:
    scheduler = _scheduler()
    bare, knows = _worker(1, index=0), _worker(1, index=1)
    one = job(0, CHAT, prompt=2000)
    scheduler.admit(one, 0.0)
    assert scheduler.first_worker(one, [bare, knows], 0.0) is bare
    assert scheduler.first_worker(one, [bare, knows], 0.0, {knows: 1984}) is knows
    assert scheduler.first_worker(one, [bare, knows], 0.0, {knows: 1984, bare: 1984}) is bare
    # Copies are cheap: for a beginning nobody piles up where others would be nearly as fast.
    _decoding(knows, 30, 0.0, CHAT, prompt=4000)
    assert COST.step_s(1, 31, knows.context + 2000) < 0.6 * CHAT.tpot_ms / 1000
    assert scheduler.first_worker(one, [bare, knows], 0.0, {knows: 1984}) is bare
    assert _scheduler(SchedulerConfig(copy_share=1.0)).first_worker(one, [bare, knows], 0.0, {knows: 1984}) is knows


def test_what_an_instance_knows_counts_for_the_first_token() -> None:
    scheduler, worker, other = _scheduler(), _worker(1, index=0), _worker(1, index=1)
    long = job(0, CHAT, prompt=30_000)
    scheduler.admit(long, 0.0)
    assert COST.prefill_s(1, 30_000) > CHAT.ttft_ms / 1000
    assert scheduler.first_worker(long, [worker, other], 0.0, {other: 29_952}) is other
    # To the others it would have to be copied, which is not promised.
    assert scheduler.first_worker(long, [worker], 0.0, {other: 29_952}) is None
    assert long.late
    # Attention to what is known takes its time all the same.
    spared_s = scheduler.predict.spared_s(1, 30_000, 15_000)
    assert 0 < spared_s <= scheduler.predict.prefill_s(1, 15_000) < scheduler.predict.prefill_s(1, 30_000) / 2


def test_a_step_ends_before_the_next_token_is_due() -> None:
    scheduler, worker = _scheduler(), _worker()
    _decoding(worker, 8, first_s=0.0)
    now = 0.010
    worker.seat(job(0, CODE, prompt=8000))
    chunks = scheduler.compose(worker, now)
    ((_, tokens),) = chunks
    step_s = COST.step_s(1, 8, worker.context, [(tokens, 0)])
    assert 0 < tokens < 8000
    assert now + step_s <= 0.025 + 1e-9
    more = COST.step_s(1, 8, worker.context, [(int(tokens * 1.1) + 16, 0)])
    assert now + more > 0.025  # and it is not much smaller than it could be


def test_fixed_chunks_keep_their_budget() -> None:
    scheduler, worker = _scheduler(SchedulerConfig(chunk_tokens=512, order="fcfs")), _worker()
    _decoding(worker, 12, first_s=0.0)
    for number in range(3):
        worker.seat(job(number, CODE, 0.1 * number, prompt=300))
    chunks = scheduler.compose(worker, 1.0)
    assert [(one.id, tokens) for one, tokens in chunks] == [("0", 300), ("1", 200)]


def test_who_cannot_be_in_time_is_late_and_delays_nobody() -> None:
    scheduler, worker = _scheduler(), _worker()
    lost, fine = job(0, CHAT, 0.0), job(1, CHAT, 5.0)
    scheduler.admit(lost, 0.0)
    scheduler.admit(fine, 5.0)
    assert scheduler.pull(worker, 5.0) is fine
    assert lost.late
    worker.seat(fine)
    assert scheduler.place_late([worker], 5.0) is None  # a prompt that counts comes first
    worker.leave(fine)
    assert scheduler.place_late([worker], 5.0) == (lost, worker)


def test_decoding_requests_that_are_lost_do_not_hold_prompts_up() -> None:
    scheduler, worker = _scheduler(), _worker()
    _decoding(worker, 4, first_s=0.0)
    worker.seat(job(0, CODE, prompt=4000))
    chunks = scheduler.compose(worker, 60.0)  # their tokens were due long ago
    assert all(one.late for one in worker.decoding.values())
    assert chunks
    assert chunks[0][1] > 1000


@pytest.mark.parametrize("order", ["deadline", "fcfs"])
@pytest.mark.parametrize("plan", [homogeneous(8, 2), place([Shape(4, tiers=("chat",)), Shape(4)], 8)], ids=str)
def test_nobody_starves_in_an_overloaded_cell(plan: Layout, order: str) -> None:
    cell, steps = make_cell(plan, config=SchedulerConfig(order=order))
    jobs = some_jobs(1500, 300.0, seed=9)
    ends = jobs[-1].arrival_s
    serve(cell, jobs)
    assert len(steps.done) == len(jobs)
    assert max(one.finish_s or math.inf for one in steps.done) > 2 * ends  # it was overloaded


def test_late_requests_move_while_others_keep_coming() -> None:
    """Aging: under a load that could fill the cell alone, requests late since a burst are served all the same."""
    cell, steps = make_cell(homogeneous(1, 1))
    burst = [job(i, CHAT, 0.0, prompt=3000, output=20) for i in range(60)]
    stream = [job(100 + i, CHAT, 0.15 * i, prompt=3000, output=20) for i in range(1200)]
    serve(cell, sorted(burst + stream, key=lambda one: one.arrival_s))
    last = stream[-1].arrival_s
    served = [one for one in burst if one.finish_s is not None and one.finish_s < last]
    assert any(one.late for one in burst)
    assert len(served) > len(burst) / 2
    assert len(steps.done) == len(burst) + len(stream)


def test_decodes_go_where_there_is_room_and_time() -> None:
    scheduler = _scheduler()
    full, free = _worker(2, index=0), _worker(2, index=1)
    _decoding(full, 30, 0.0, prompt=3000)
    one = job(0, CHAT, prompt=1000)
    one.cached = one.target
    assert scheduler.decode_worker(one, [full, free], 0.0) is free
    free.stopping = True
    assert scheduler.decode_worker(one, [full, free], 0.0) is full


QUICK = Tier("chat", ttft_ms=500, tpot_ms=9)


def _decoder(count: int, first_s: float, generated: int) -> Worker:
    """A decode instance of TP 1 with so many of QUICK, all of whom have made so many tokens."""
    plan = InstanceSpec((0,), Role.DECODE)
    worker: Worker[ModelJob] = Worker(0, plan, COST.kv_capacity_tokens(1), COST.page_size, 256)
    _decoding(worker, count, first_s, QUICK)
    worker.advance(generated - 1)
    return worker


def _full(share: float) -> int:
    """How many of QUICK, of 600 tokens each, fill this share of their time per token."""
    return next(n for n in range(1, 256) if COST.step_s(1, n, 600 * n) > share * QUICK.tpot_ms / 1000)


def _prefilled(first_s: float) -> ModelJob:
    one = job(0, QUICK, first_s - 0.1, prompt=500, output=200)
    one.cached, one.generated, one.first_token_s, one.expected_output = 500, 1, first_s, 200.0
    return one


def test_a_request_waits_where_its_decoding_would_cost_others_their_targets_and_is_late_in_the_end() -> None:
    scheduler, count = _scheduler(), _full(0.96)
    tpot_s = QUICK.tpot_ms / 1000
    behind = _decoder(count, -100 * tpot_s, 100)  # on time to the token: they bear nothing
    waiting = _prefilled(-0.001)
    assert scheduler.decode_worker(waiting, [behind], 0.0) is None
    lateness = [waiting.late]
    assert scheduler.decode_worker(waiting, [behind], 100 * tpot_s) is None  # too late to catch up
    assert [*lateness, waiting.late] == [False, True]
    # By order of arrival nobody waits.
    assert _scheduler(SchedulerConfig(order="fcfs")).decode_worker(_prefilled(0.0), [behind], 0.0) is behind


def test_those_who_are_ahead_bear_a_crowd_for_a_while() -> None:
    ahead = _decoder(_full(1.0), -100 * 0.5 * QUICK.tpot_ms / 1000, 100)
    assert _scheduler().decode_worker(_prefilled(0.0), [ahead], 0.0) is ahead
    crowded = _decoder(_full(1.2), -100 * 0.5 * QUICK.tpot_ms / 1000, 100)
    assert _scheduler().decode_worker(_prefilled(0.0), [crowded], 0.0) is None


def test_a_late_request_decodes_where_there_is_room_to_spare_and_after_its_patience_anywhere() -> None:
    scheduler = _scheduler()
    late = _prefilled(0.0)
    late.give_up()
    full = _decoder(_full(0.93), 0.0, 1)
    assert scheduler.decode_worker(late, [full], 0.0) is None
    assert scheduler.decode_worker(late, [_decoder(2, 0.0, 1)], 0.0) is not None
    assert scheduler.decode_worker(late, [full], scheduler.config.patience_s + 1) is full


@pytest.mark.parametrize("rate", [4.0, 40.0])
def test_everybody_ends_in_a_split_however_crowded_it_is(rate: float) -> None:
    cell, steps = make_cell(place([Shape(1, "prefill"), Shape(1, "decode")], 2))
    jobs = some_jobs(150, rate, seed=3)
    serve(cell, jobs)
    assert len(steps.done) == len(jobs)
    assert not cell.alive


def test_late_requests_give_up_their_cache_first_and_then_who_came_last() -> None:
    early, last, late = (
        ModelJob("a", CHAT, 0.0, 100),
        ModelJob("b", CHAT, 2.0, 100),
        ModelJob("c", CHAT, 1.0, 100, late=True),
    )
    assert Scheduler.victim([early, last, late]) is late
    assert Scheduler.victim([early, last]) is last


def test_who_finds_no_instance_is_looked_at_when_others_may_take_it_and_when_it_is_late() -> None:
    scheduler = _scheduler(SchedulerConfig(spill_after=0.5))
    one = ModelJob("a", CHAT, 0.0, 500)
    scheduler.admit(one, 0.0)
    spill_s, late_s = scheduler.wakes(one, 0.0)
    assert (spill_s, late_s) == pytest.approx((one.latest_start_s / 2, one.latest_start_s), abs=1e-5)
    assert late_s > one.latest_start_s  # at that time itself it could still begin
    assert scheduler.wakes(one, spill_s) == [late_s]
    one.give_up()
    assert scheduler.wakes(one, 0.0) == []  # it waits for room alone


def test_outputs_are_expected_to_be_as_those_that_ended_unless_somebody_says_otherwise() -> None:
    scheduler = _scheduler()
    for number in range(40):
        scheduler.ended(ModelJob(str(number), CHAT, 0.0, 100, generated=20 + 20 * (number % 2)))
    came = ModelJob("a", CHAT, 0.0, 100), ModelJob("b", CODE, 0.0, 100)
    for job_ in came:
        scheduler.admit(job_, 0.0)
    assert [job_.expected_output for job_ in came] == [30, 128]  # nobody of the other tier has ended
    scheduler.expect_output(CHAT.name, 77)
    scheduler.ended(ModelJob("c", CHAT, 0.0, 100, generated=1000))
    assert scheduler.expected_output(CHAT.name) == 77
