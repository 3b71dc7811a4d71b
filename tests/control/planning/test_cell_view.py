"""What a controller sees of a cell: numbers of one moment."""

import dataclasses

import pytest

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.scheduling.backlog import Backlog
from nitsum_jax.control.scheduling.worker import Worker
from nitsum_jax.control.tiers import Tier

CHAT = Tier("chat", ttft_ms=300, tpot_ms=4)


def test_a_view_stays_as_it_was_while_the_cell_goes_on() -> None:
    plan = homogeneous(2, 2)
    backlog: Backlog[ModelJob] = Backlog()
    worker: Worker[ModelJob] = Worker(0, plan.instances[0], 1600, 16, 32)
    waits, prefills, decodes = (
        ModelJob(name, CHAT, arrival_s, 100) for name, arrival_s in (("w", 2.0), ("p", 1.0), ("d", 0))
    )
    backlog.push(waits)
    worker.seat(prefills)
    worker.seat(decodes)
    decodes.cached, decodes.generated, decodes.first_token_s = 100, 1, 0.1
    worker.begin_decode(decodes)
    prefills.cached = 60
    view = CellView.of(plan, 2, [worker], backlog)
    before = dataclasses.astuple(view)
    (seen,) = view.workers
    assert (seen.tp, seen.jobs, seen.decoding, seen.context, seen.prefill_left) == (2, 2, 1, 100, 40)
    assert (seen.tightest_tpot_s, seen.max_batch) == (0.004, 32)
    assert seen.used_share == 14 / 100  # two prompts of seven pages
    assert [(job.id, job.left_tokens) for job in view.waiting] == [("p", 40), ("w", 100)]  # first come first
    assert (view.backlog, view.backlog_tokens) == (1, 100)
    backlog.remove(waits)
    worker.advance(20)
    worker.leave(prefills)
    waits.give_up()
    assert dataclasses.astuple(view) == before
    hash(view)  # nothing in it can be changed


def test_only_who_can_still_be_in_time_is_told_to_wait() -> None:
    backlog: Backlog[ModelJob] = Backlog()
    for name, late, first_token_s in (("in time", False, None), ("late", True, None), ("sent back", False, 1.0)):
        backlog.push(ModelJob(name, CHAT, 0.0, 100, late=late, first_token_s=first_token_s))
    view = CellView.of(homogeneous(2, 2), 2, [], backlog)
    assert [job.id for job in view.waiting] == ["in time"]
    assert (view.backlog, view.backlog_tokens) == (3, 200)  # of those two that are in time


@pytest.mark.parametrize("finish_s", [0.2, 10.0])
def test_a_request_that_has_ended_says_whether_it_met_its_targets(finish_s: float) -> None:
    job = ModelJob("a", CHAT, 0.0, 100, output_tokens=50, generated=50, first_token_s=0.1, finish_s=finish_s)
    assert JobView.of(job).met is job.met() is (finish_s < 1)
