"""An instance's accounts in the live server, beyond those of every worker."""

import types
from typing import cast

import pytest

from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import InstancePlan
from nitsum_jax.control.tiers import Tier
from nitsum_jax.engine.instance import Instance
from nitsum_jax.runtime.scheduling.live_worker import LiveWorker

TIER = Tier("chat", ttft_ms=500, tpot_ms=50)


def decoding(worker: LiveWorker, name: str) -> Job:
    one = Job(name, TIER, 0.0, 20, 100)
    one.target = 20
    worker.seat(one)
    one.cached, one.generated, one.first_token_s = 20, 1, 1.0
    worker.begin_decode(one)
    return one


def test_jobs_that_are_due_at_the_same_time_need_no_order() -> None:
    instance = types.SimpleNamespace(total_pages=lambda: 1000, free_pages=lambda: 1000, free_rows=8, broken=False)
    worker = LiveWorker(0, InstancePlan((0,)), cast(Instance, instance), 16, 64)
    for number in range(200):  # first tokens that came when they were expected, among others that are still to come
        worker.retime(decoding(worker, str(number)))
        decoding(worker, f"{number}+")
    assert worker.slack_s(0.0) == pytest.approx(1.05)  # the second token of each is due
