"""An instance's accounts in the live server, beyond those of every worker."""

import math
import types
from typing import cast

import numpy as np
import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.routing.report import make_report
from nitsum_jax.control.scheduling.forecast import forecast
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import FinishReason, Request
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.runtime.scheduling.live_worker import LiveJob, LiveWorker
from tests.control.profiles import roofline_profile

TIER = Tier("chat", ttft_ms=500, tpot_ms=50)


def arrived(name: str) -> LiveJob:
    request = Request(name, (1,) * 20, 100, tier="chat")
    return LiveJob(LiveRequest(request, 0, [1] * 20, np.zeros((1, 8), np.int32), 120), TIER, 0.0)


def decoding(worker: LiveWorker, name: str) -> LiveJob:
    one = arrived(name)
    worker.seat(one)
    one.sequence.dispatched(20, emits=True)
    one.first_token_s = 1.0
    worker.begin_decode(one)
    return one


def test_jobs_that_are_due_at_the_same_time_need_no_order() -> None:
    instance = types.SimpleNamespace(total_pages=lambda: 1000, free_pages=lambda: 1000, free_rows=8, broken=False)
    worker = LiveWorker(0, InstanceSpec((0,)), cast(Instance, instance), 16, 64)
    for number in range(200):  # first tokens that came when they were expected, among others that are still to come
        worker.retime(decoding(worker, str(number)))
        decoding(worker, f"{number}+")
    assert worker.slack_s(0.0) == pytest.approx(1.05)  # the second token of each is due


def test_a_job_says_at_once_what_the_engine_knows_of_its_request() -> None:
    one = arrived("a")
    sequence = one.sequence
    assert (one.target, one.cached, one.generated) == (20, 0, 0)
    sequence.found(16)  # pages that others have computed
    sequence.dispatched(4, emits=True)
    assert (one.target, one.cached, one.generated) == (20, 20, 1)  # the token is on its way
    sequence.settled(emits=True)
    sequence.accept(7)
    sequence.dispatched(1, emits=True)
    assert (one.cached, one.generated) == (21, 2)
    sequence.forget_flights()  # a device was lost
    sequence.start_over(again=False)
    assert (one.target, one.cached, one.generated) == (21, 0, 1)  # its output is computed like a prompt


def test_a_request_that_stops_at_its_first_token_has_made_one() -> None:
    one = arrived("a")
    one.sequence.dispatched(20, emits=True)
    one.sequence.settled(emits=True)
    one.sequence.finish = FinishReason.STOP
    one.finish_s = 2.0
    assert one.generated == 1


def test_an_instance_whose_rows_are_all_taken_still_serves() -> None:
    """One will be free: a request that waits for it is in time, and is told when, and so is a router."""
    instance = types.SimpleNamespace(total_pages=lambda: 1000, free_pages=lambda: 900, free_rows=0, broken=False)
    worker = LiveWorker(0, InstanceSpec((0,)), cast(Instance, instance), 16, 2)
    decoding(worker, "a")
    decoding(worker, "b")
    assert worker.serves_prompts
    assert not worker.takes_prompts
    scheduler: Scheduler[LiveJob, LiveWorker] = Scheduler(CostModel(roofline_profile()), (TIER,))
    one = arrived("c")
    scheduler.admit(one, 0.0)
    assert scheduler.first_worker(one, [worker], 0.0) is None
    assert not one.late
    said = forecast(scheduler, [worker], TIER, 0.0)
    assert 0 < said.wait_s < said.ttft_s < math.inf
    assert all(map(math.isfinite, make_report("cell", scheduler, [worker], 0.0).prefill_s))
    instance.broken = True  # nobody is served there any more
    assert forecast(scheduler, [worker], TIER, 0.0).ttft_s == math.inf
