"""Instances on nodes: everything that is wanted lies somewhere, never across nodes, and what can stay stays."""

import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.planning.fleet.nodes import (
    changed_devices,
    fits,
    kinds_of,
    nodes_of,
    place_fleet,
    room_for,
    runs_of,
)
from nitsum_jax.meshes.layout import Layout

NODE = 4
TPS = (1, 2, 4)
KEPT = (("mixed", ()), ("mixed", ("chat",)), ("prefill", ()))
SHAPES = [Shape(tp, role, tiers) for tp in TPS for role, tiers in KEPT]


def check(plan: Layout, shapes: list[Shape], num_devices: int, lost: tuple[int, ...] = ()) -> None:
    devices = [device for instance in plan.instances for device in instance.devices]
    assert len(set(devices)) == len(devices)
    assert set(devices) <= set(range(num_devices)) - set(lost)
    assert collections.Counter(plan.shapes) == collections.Counter(shapes)
    assert all(i.devices[0] // NODE == i.devices[-1] // NODE for i in plan.instances)
    for instance in plan.instances:
        assert {device % instance.tp for device in instance.devices} == set(range(instance.tp))


@st.composite
def fillings(draw: st.DrawFn, nodes: int = 4) -> list[Shape]:
    """Shapes that take at most the devices of the nodes."""
    left = nodes * NODE
    found = []
    while left and draw(st.integers(0, 9)):
        shape = draw(st.sampled_from([shape for shape in SHAPES if shape.tp <= left]))
        found.append(shape)
        left -= shape.tp
    return found or [Shape(1)]


@settings(max_examples=60, deadline=None)
@given(fillings(), fillings())
def test_any_plan_follows_any_other(first: list[Shape], then: list[Shape]) -> None:
    size = 4 * NODE
    nothing = Layout(())
    before = place_fleet(first, size, NODE, nothing)
    check(before, first, size)
    assert place_fleet(first, size, NODE, before) == before
    after = place_fleet(then, size, NODE, before)
    check(after, then, size)
    # What no plan could keep is the least that changes; whole nodes that can be kept are.
    gone = kinds_of(first) - kinds_of(then)
    assert changed_devices(before, after) >= sum(tp * count for (tp, _), count in gone.items())


@settings(max_examples=60, deadline=None)
@given(fillings(3), st.sets(st.integers(0, 11), max_size=4))
def test_lost_devices_are_left_out_or_it_is_said_not_to_fit(shapes: list[Shape], lost: set[int]) -> None:
    away = tuple(sorted(lost))
    runs = runs_of(nodes_of(Layout(()), 12, NODE, away), TPS)
    before = homogeneous(12, 2)
    if fits(kinds_of(shapes), {tp: runs[tp] for tp in {shape.tp for shape in shapes}}):
        check(place_fleet(shapes, 12, NODE, before, away), shapes, 12, away)
        more = [*shapes, *[Shape(2)] * max(0, room_for(2, kinds_of(shapes), runs))]
        check(place_fleet(more, 12, NODE, before, away), more, 12, away)
        with pytest.raises(ValueError, match="do not fit"):
            place_fleet([*more, Shape(2)], 12, NODE, before, away)
    else:
        with pytest.raises(ValueError, match="do not fit"):
            place_fleet(shapes, 12, NODE, before, away)


def fewest_changed(before: Layout, shapes: list[Shape], nodes: int) -> int:
    """By trying every way to deal the instances to the nodes."""
    best = nodes * NODE
    for dealt in itertools.product(range(nodes), repeat=len(shapes)):
        parts = [[shape for shape, n in zip(shapes, dealt, strict=True) if n == node] for node in range(nodes)]
        if any(sum(shape.tp for shape in part) > NODE for part in parts):
            continue
        total = 0
        for node, there in zip(parts, nodes_of(before, nodes * NODE, NODE), strict=True):
            old = Layout(there.instances)
            total += changed_devices(old, place(node, NODE, old))
        best = min(best, total)
    return best


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ([4, 2, 2, 2, 2], [4, 4, 2, 2]),
        ([4, 4, 4], [2, 2, 2, 2, 4]),
        ([2, 2, 2, 2, 1, 1, 1, 1], [2, 2, 4, 1, 1, 1, 1]),
        ([2, 2, 2, 2, 4], [4, 4, 4]),
    ],
)
def test_the_fewest_devices_change(first: list[int], then: list[int]) -> None:
    before = place_fleet([Shape(tp) for tp in first], 12, NODE, Layout(()))
    after = place_fleet([Shape(tp) for tp in then], 12, NODE, before)
    assert changed_devices(before, after) == fewest_changed(before, [Shape(tp) for tp in then], 3)


def test_other_tiers_change_no_device() -> None:
    before = homogeneous(16, 2)
    after = place_fleet([Shape(2, tiers=("chat",))] * 3 + [Shape(2)] * 5, 16, NODE, before)
    assert changed_devices(before, after) == 0
    again = place_fleet([Shape(2, tiers=("chat",))] * 2 + [Shape(2)] * 6, 16, NODE, after)
    assert sum(a != b for a, b in zip(after.instances, again.instances, strict=True)) == 1
