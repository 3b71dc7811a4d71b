"""The backlog against a plain list."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.scheduling.backlog import Backlog
from tests.control.cells import CHAT, CODE, job


def _waiting(
    number: int, latest_start_s: float, arrival_s: float = 0.0, tier: object = CHAT, prompt_s: float = 0.0
) -> ModelJob:
    one = job(number, tier, arrival_s)  # type: ignore[arg-type]
    one.latest_start_s, one.due_s = latest_start_s, latest_start_s + prompt_s
    return one


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_equals_a_plain_list(seed: int) -> None:
    draw = random.Random(seed)
    backlog: Backlog[ModelJob] = Backlog()
    in_time: list[ModelJob] = []
    late: list[ModelJob] = []
    now = 0.0
    for number in range(60):
        kind = draw.choice(("push", "push", "remove", "demote"))
        if kind == "push":
            one = _waiting(number, now + draw.uniform(0, 5), now, draw.choice((CHAT, CODE)), draw.uniform(0, 2))
            backlog.push(one)
            in_time.append(one)
        elif kind == "remove" and in_time + late:
            one = draw.choice(in_time + late)
            assert backlog.remove(one)
            assert not backlog.remove(one)
            (in_time if one in in_time else late).remove(one)
        elif kind == "demote":
            expected = [one for one in in_time if one.latest_start_s < now]
            assert set(map(id, backlog.demote(now))) == set(map(id, expected))
            assert all(one.late for one in expected)
            late += expected
            in_time = [one for one in in_time if one not in expected]
        now += draw.uniform(0, 0.5)
        assert len(backlog) == len(in_time) + len(late)
        assert backlog.in_time == len(in_time)
        assert sorted(one.id for one in backlog.jobs()) == sorted(one.id for one in in_time + late)
        for tier in (CHAT, CODE):
            assert backlog.waiting(tier.name) == sum(one.tier is tier for one in in_time)
        heads = list(backlog.heads(2))
        for tier in (CHAT, CODE):
            mine = sorted((one for one in in_time if one.tier is tier), key=lambda one: one.due_s)
            assert [one for one in heads if one.tier is tier] == mine[:2]
        assert sorted(one.id for one in backlog.late()) == sorted(one.id for one in late)
        arrivals = [one.arrival_s for one in backlog.late()]
        assert arrivals == sorted(arrivals)


def test_tiers_come_in_the_order_of_their_most_urgent_request() -> None:
    backlog: Backlog[ModelJob] = Backlog()
    for number, (latest, tier) in enumerate(((3.0, CHAT), (1.0, CODE), (2.0, CHAT))):
        backlog.push(_waiting(number, latest, tier=tier))
    assert [one.id for one in backlog.heads(3)] == ["1", "2", "0"]


def test_by_arrival_nobody_is_late() -> None:
    backlog: Backlog[ModelJob] = Backlog(by_arrival=True)
    backlog.push(_waiting(0, latest_start_s=1.0, arrival_s=0.5))
    backlog.push(_waiting(1, latest_start_s=9.0, arrival_s=0.1))
    assert backlog.demote(100.0) == []
    assert [one.id for one in backlog.heads(2)] == ["1", "0"]
