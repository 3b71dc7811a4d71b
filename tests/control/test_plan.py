"""Plans: their text, and where instances come to lie."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.plan import Shape, homogeneous, partitions, place, shapes_text
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role, parse_layout


def test_text_joins_equal_neighbours() -> None:
    shapes = (Shape(4, "prefill"), Shape(2), Shape(2), Shape(1, tiers=("chat", "code")))
    assert shapes_text(shapes) == "tp4:prefill+tp2x2+tp1/chat,code"
    assert shapes_text((Shape(2, "decode", ("chat",)),) * 3) == "tp2x3:decode/chat"


def test_layout_names_devices_roles_and_tiers() -> None:
    plan = Layout((InstanceSpec((0, 1), Role.PREFILL), InstanceSpec((2,), tiers=("chat",))))
    assert plan.placed == "tp2@0,1:prefill+tp1@2/chat"
    assert plan.unplaced == "tp2:prefill+tp1/chat"
    assert parse_layout(plan.placed, 3) == plan


def test_partitions_are_all_of_them() -> None:
    found = set(partitions(8, (1, 2, 4, 8)))
    naive = {
        tuple(sorted(cut, reverse=True))
        for count in range(1, 9)
        for cut in itertools.combinations_with_replacement((1, 2, 4, 8), count)
        if sum(cut) == 8
    }
    assert found == naive
    assert len(list(partitions(8, (1, 2, 4, 8)))) == len(found)


def test_partitions_leave_idle_what_no_tp_fits() -> None:
    assert set(partitions(7, (2, 4))) == {(4, 2), (2, 2, 2)}
    assert list(partitions(1, (2, 4))) == []


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[Shape, ...]:
    cut = draw(st.sampled_from(list(partitions(8, (1, 2, 4, 8)))))
    role = st.sampled_from(("mixed", "prefill", "decode"))
    tiers = st.sampled_from(((), ("chat",), ("code",)))
    return tuple(Shape(tp, draw(role), draw(tiers)) for tp in cut)


@given(_shapes(), _shapes())
def test_placing_keeps_what_it_can_and_fits_the_engine(first: tuple[Shape, ...], second: tuple[Shape, ...]) -> None:
    before = place(first, 8)
    after = place(second, 8, before)
    assert sorted(map(str, after.shapes)) == sorted(map(str, second))
    devices = [device for instance in after.instances for device in instance.devices]
    assert sorted(devices) == list(range(8))
    for instance in after.instances:  # aligned runs: any of them can form an instance of the engine
        start = instance.devices[0]
        assert instance.devices == tuple(range(start, start + instance.tp))
        assert start % instance.tp == 0
    assert place(first, 8, before) == before


def test_only_what_changes_moves() -> None:
    before = place([Shape(4), Shape(1), Shape(1), Shape(1), Shape(1)], 8)
    after = place([Shape(4), Shape(2), Shape(1), Shape(1)], 8, before)
    kept = {i.devices for i in before.instances} & {i.devices for i in after.instances}
    assert (0, 1, 2, 3) in kept
    assert len(kept) == 3


def test_lost_devices_are_not_used() -> None:
    plan = place([Shape(4), Shape(2), Shape(1)], 8, homogeneous(8, 8), lost=(5,))
    assert 5 not in {device for instance in plan.instances for device in instance.devices}
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        place([Shape(8)], 8, lost=(0,))
