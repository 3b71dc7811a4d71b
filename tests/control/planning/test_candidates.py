"""The plans that a planner chooses from."""

import pytest

from nitsum_jax.control.plan import DECODE, MIXED, PREFILL
from nitsum_jax.control.planning.candidates import joint_plans, mixed_plans, split_plans

TPS = (1, 2, 4, 8)


@pytest.mark.parametrize("tiers", [("a",), ("a", "b"), ("a", "b", "c")])
def test_mixed_plans_use_all_devices_serve_all_tiers_and_differ(tiers: tuple[str, ...]) -> None:
    plans = list(mixed_plans(8, TPS, tiers))
    assert len({tuple(sorted(map(str, plan))) for plan in plans}) == len(plans)
    for plan in plans:
        assert sum(shape.tp for shape in plan) == 8
        served = {tier for shape in plan for tier in (shape.tiers or tiers)}
        assert served == set(tiers)


def test_all_ways_to_cut_eight_devices_are_there() -> None:
    cuts = {tuple(shape.tp for shape in plan) for plan in mixed_plans(8, TPS, ("a", "b"))}
    assert len(cuts) == 10  # partitions of 8 into 1, 2, 4, 8
    assert {(8,), (4, 1, 1, 1, 1), (2, 2, 2, 2)} <= cuts


def test_tight_tiers_have_the_large_instances() -> None:
    for plan in mixed_plans(8, TPS, ("tight", "loose")):
        tight = [shape.tp for shape in plan if shape.tiers == ("tight",)]
        loose = [shape.tp for shape in plan if shape.tiers == ("loose",)]
        assert not tight or not loose or min(tight) >= max(loose)


def test_split_plans_have_both_roles_and_leave_no_instance_worth_of_devices_idle() -> None:
    plans = list(split_plans(8, TPS))
    assert plans
    for plan in plans:
        assert {shape.role for shape in plan} == {PREFILL, DECODE}
        assert 8 - sum(shape.tp for shape in plan) < min(shape.tp for shape in plan)


def test_joint_plans_have_all_three_roles_use_all_devices_and_differ() -> None:
    plans = list(joint_plans(8, TPS))
    assert len({tuple(sorted(map(str, plan))) for plan in plans}) == len(plans)
    for plan in plans:
        assert {shape.role for shape in plan} == {PREFILL, MIXED, DECODE}
        assert sum(shape.tp for shape in plan) == 8
    assert not list(joint_plans(2, TPS))


def test_a_model_with_a_least_tp_is_cut_no_finer() -> None:
    assert {shape.tp for plan in mixed_plans(8, (4, 8), ("a",)) for shape in plan} == {4, 8}
    assert [shape.tp for shape in next(iter(mixed_plans(7, (2, 4), ("a",))))] == [4, 2]  # one device is left over
