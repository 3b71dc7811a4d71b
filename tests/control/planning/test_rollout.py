"""Replays: what they count, and that giving one up changes nothing but its end."""

import math

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.rollout import Arrival, Replay, rollout
from nitsum_jax.control.tiers import Tier
from tests.control.profiles import roofline_profile

COST = CostModel(roofline_profile())
TIERS = (Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100))
LOADS = (TierLoad("chat", 20.0, 1.0, (1000,), 100.0), TierLoad("code", 5.0, 1.0, (1000,), 30.0))


def replay(
    tp: int,
    rate: float = 25.0,
    *,
    count: int = 200,
    waiting: tuple[Arrival, ...] = (),
    pressure: float = 1.0,
    most_missed: float = math.inf,
    max_batch: int = 256,
) -> Replay:
    arrivals = [Arrival(5 + i / rate, "code" if i % 5 == 0 else "chat", 1000, 60) for i in range(count)]
    return rollout(
        COST,
        TIERS,
        homogeneous(8, tp),
        arrivals,
        LOADS,
        waiting=waiting,
        pressure=pressure,
        most_missed=most_missed,
        max_batch=max_batch,
    )


def test_a_plan_that_serves_all_misses_nobody() -> None:
    found = replay(4)
    assert found == Replay(1.0, 0.0, frozenset(), False, 200)


def test_the_first_quarter_is_not_counted_and_shares_are_of_the_rest() -> None:
    found = replay(1)  # too slow for chat
    assert min(found.late) >= 50
    assert found.missed == len(found.late)
    assert math.isclose(found.share, 1 - found.missed / 150)


def test_a_replay_that_misses_too_many_is_given_up() -> None:
    whole = replay(1)
    part = replay(1, most_missed=20)
    assert part.given_up
    assert not whole.given_up
    assert 20 < part.missed <= whole.missed
    assert part.late <= whole.late
    assert replay(1, most_missed=whole.missed) == whole


def test_pressure_is_a_higher_rate() -> None:
    assert replay(4, 150.0, pressure=4.0).missed == replay(4, 600.0).missed > 0
    assert replay(4, 150.0).missed == 0


def test_those_that_wait_come_first_and_count() -> None:
    aged = tuple(Arrival(-0.29, "chat", 1000, 60) for _ in range(30))
    found = replay(4, waiting=aged)
    assert {number for number in found.late if number >= 200}


def test_instances_hold_as_many_as_they_are_said_to() -> None:
    assert replay(4, max_batch=1).missed > replay(4).missed == 0
