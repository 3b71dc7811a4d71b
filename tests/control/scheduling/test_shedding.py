"""Whom to give up in an overload: as few as can be, against trying all sets; and how fast a backlog goes down."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.scheduling.backlog import Backlog
from nitsum_jax.control.scheduling.scheduler import SchedulerConfig
from nitsum_jax.control.scheduling.shedding import Drain, overflow
from tests.control.cells import CHAT, CODE, COST, job, make_cell, serve


def _in_time(latest_ends: list[float], work: list[float], kept: list[int], rate: float) -> bool:
    done = 0.0
    for place in sorted(kept, key=lambda place: latest_ends[place]):
        done += work[place] / rate
        if done > latest_ends[place] + 1e-9:
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), min_size=1, max_size=8),
    st.sampled_from([1.0, 0.5, 2.0]),
)
def test_as_few_as_any_choice_could_give_up(requests: list[tuple[int, int]], rate: float) -> None:
    # With deadlines for ends (slack and the work itself at that speed) it is Moore's problem, which has an optimum.
    ordered = sorted(requests, key=lambda request: request[0] + request[1] / rate)
    work = [float(w) for _, w in ordered]
    ends = [slack + w / rate for (slack, _), w in zip(ordered, work, strict=True)]
    slacks = [end - w / rate for end, w in zip(ends, work, strict=True)]
    given_up = overflow(slacks, work, rate)
    assert len(set(given_up)) == len(given_up)
    kept = [place for place in range(len(work)) if place not in given_up]
    assert _in_time(ends, work, kept, rate)
    for count in range(len(kept) + 1, len(work) + 1):
        assert not any(
            _in_time(ends, work, list(some), rate) for some in itertools.combinations(range(len(work)), count)
        )


def test_the_longest_goes_and_not_the_one_that_would_be_late() -> None:
    assert overflow([0.0, 1.0, 2.0], [5.0, 1.0, 1.0], 1.0) == [0]
    assert overflow([10.0, 10.0, 10.0], [5.0, 1.0, 1.0], 1.0) == []


def test_the_drain_is_the_work_that_leaves_while_some_wait() -> None:
    drain = Drain(1.0)
    drain.took(0.0, 5.0)  # nobody waits: it says nothing of what can be served
    drain.begins(0.0)
    assert drain.rate(0.5) is None  # for too short a time
    for tenth in range(1, 21):
        drain.took(tenth / 10, 0.2)
    assert drain.rate(2.0) == pytest.approx(2.0, rel=0.11)
    drain.ends()
    drain.begins(3.0)
    assert drain.rate(3.5) is None


def test_a_backlog_sheds_one_tier_and_serves_the_late_ones_last() -> None:
    backlog: Backlog[ModelJob] = Backlog()
    long, short, other = job(0, CODE), job(1, CODE), job(2, CHAT)
    for one, work_s in ((long, 2.0), (short, 0.1), (other, 9.0)):
        one.due_s = one.ttft_deadline_s
        one.latest_start_s = one.due_s - work_s
        backlog.push(one)
    # The long one could begin just now, but the short one, which is due with it, goes first.
    assert backlog.shed(CODE.name, long.latest_start_s, 0.5) == [long]
    assert [one.late for one in (long, short, other)] == [True, False, False]
    assert (backlog.waiting(CODE.name), backlog.waiting(CHAT.name)) == (1, 1)
    assert next(backlog.late()) is long


def _attained(config: SchedulerConfig) -> float:
    """Share in time of code, half as much again as four instances can serve, with some chat in between."""
    seconds = 4 * CODE.ttft_ms / 1000
    mean_s = (COST.prefill_s(2, 2000) + COST.prefill_s(2, 6000)) / 2
    count = int(1.5 * 4 * seconds / mean_s)
    jobs = [job(i, CODE, i * seconds / count, prompt=6000 if i % 2 else 2000, output=4) for i in range(count)]
    jobs += [job(count + i, CHAT, i / 4, prompt=1000, output=50) for i in range(int(4 * seconds))]
    cell, steps = make_cell(homogeneous(8, 2), config=config)
    serve(cell, sorted(jobs, key=lambda one: one.arrival_s))
    assert len(steps.done) == len(jobs)  # those that were given up are served all the same
    return sum(one.met() for one in steps.done) / len(jobs)


def test_an_overload_leaves_as_many_in_time_as_can_be() -> None:
    """Two thirds by time, the shorter ones: by least slack, without giving any up early, it was 59 %."""
    given_up, waiting = _attained(SchedulerConfig()), _attained(SchedulerConfig(shed_window_s=0.0))
    assert min(given_up, waiting) > 0.85
    assert given_up >= waiting


def test_by_order_of_arrival_nobody_is_given_up() -> None:
    fcfs = SchedulerConfig(order="fcfs")
    assert _attained(fcfs) == _attained(dataclasses.replace(fcfs, shed_window_s=0.0))
