"""The map from vshards to devices: nesting, partition, and the errors of groups that cannot be instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.vshards import VshardMap, bit_reverse, is_power_of_two, ranks_differ

powers = st.integers(0, 6).map(lambda bits: 2**bits)


@st.composite
def maps(draw: st.DrawFn) -> VshardMap:
    k, m = sorted((draw(powers), draw(powers)), reverse=True)
    return VshardMap(k, m)


@st.composite
def maps_and_groups(draw: st.DrawFn) -> tuple[VshardMap, tuple[int, ...]]:
    """A map and any group that may be an instance: one device of each remainder, from anywhere, in any order."""
    vmap = draw(maps())
    tp = draw(st.sampled_from(vmap.tps))
    group = [remainder + tp * draw(st.integers(0, 20)) for remainder in range(tp)]
    return vmap, tuple(draw(st.permutations(group)))


@pytest.mark.parametrize(("number", "bits", "reversed_"), [(0, 0, 0), (1, 1, 1), (1, 3, 4), (6, 3, 3), (11, 4, 13)])
def test_bit_reverse(number: int, bits: int, reversed_: int) -> None:
    assert bit_reverse(number, bits) == reversed_


@given(st.integers(0, 12), st.data())
def test_bit_reverse_undoes_itself(bits: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(0, 2**bits - 1))
    assert bit_reverse(bit_reverse(number, bits), bits) == number


def test_is_power_of_two() -> None:
    assert [n for n in range(-4, 20) if is_power_of_two(n)] == [1, 2, 4, 8, 16]


def test_table_of_the_docstring() -> None:
    vmap = VshardMap(4)
    table = {tp: [list(vmap.vshards_of(device, tp)) for device in range(4)] for tp in vmap.tps}
    assert table == {1: [[0, 1, 2, 3]] * 4, 2: [[0, 1], [2, 3], [0, 1], [2, 3]], 4: [[0], [2], [1], [3]]}


@given(maps())
def test_tps_are_the_powers_of_two_from_m_to_k(vmap: VshardMap) -> None:
    assert list(vmap.tps) == [2**b for b in range(10) if vmap.min_tp <= 2**b <= vmap.num_vshards]


@given(maps(), st.integers(0, 200))
def test_ranges_nest(vmap: VshardMap, device: int) -> None:
    for tp in vmap.tps[:-1]:
        assert set(vmap.vshards_of(device, 2 * tp)) < set(vmap.vshards_of(device, tp))


@given(maps_and_groups())
def test_an_instance_holds_each_vshard_once(case: tuple[VshardMap, tuple[int, ...]]) -> None:
    vmap, group = case
    held = [vshard for device in vmap.ordered(group) for vshard in vmap.vshards_of(device, len(group))]
    assert held == list(range(vmap.num_vshards))  # once each, and ascending in mesh order


@given(maps_and_groups())
def test_device_of_agrees_with_vshards_of(case: tuple[VshardMap, tuple[int, ...]]) -> None:
    vmap, group = case
    for vshard in range(vmap.num_vshards):
        assert [d for d in group if vshard in vmap.vshards_of(d, len(group))] == [vmap.device_of(group, vshard)]


@given(maps(), st.integers(0, 100), st.data())
def test_neighbours_can_always_be_an_instance(vmap: VshardMap, start: int, data: st.DataObject) -> None:
    tp = data.draw(st.sampled_from(vmap.tps))
    vmap.check_group(range(start, start + tp))


@given(maps(), st.integers(0, 100), st.data())
def test_resident_is_the_range_of_the_smallest_tp(vmap: VshardMap, device: int, data: st.DataObject) -> None:
    tps = data.draw(st.sets(st.sampled_from(vmap.tps), min_size=1))
    assert vmap.resident(device, tps) == tuple(vmap.vshards_of(device, min(tps)))


def test_resident_of_no_tp_is_empty() -> None:
    assert VshardMap(4).resident(1, []) == ()


def test_residency_unites_the_groups() -> None:
    residency = VshardMap(4).residency([(0, 1, 2, 3), (2, 3), (0,)])
    assert residency == {
        0: frozenset({0, 1, 2, 3}),
        1: frozenset({2}),
        2: frozenset({0, 1}),
        3: frozenset({2, 3}),
    }


@pytest.mark.parametrize("k", [0, -4, 3, 6, 12])
def test_the_number_of_vshards_must_be_a_power_of_two(k: int) -> None:
    with pytest.raises(InvalidInputError, match=f"vshards={k} "):
        VshardMap(k)


@pytest.mark.parametrize("m", [0, 3, 8])
def test_the_smallest_tp_must_fit(m: int) -> None:
    with pytest.raises(InvalidInputError, match=f"smallest TP of {m} "):
        VshardMap(4, m)


@pytest.mark.parametrize("group", [(0, 2), (1, 1), (0, 1, 2, 4)])
def test_devices_of_equal_rank_cannot_be_an_instance(group: tuple[int, ...]) -> None:
    vmap = VshardMap(4)
    assert not ranks_differ(group)
    for call in (vmap.check_group, vmap.ordered, lambda g: vmap.device_of(g, 0), lambda g: vmap.residency([g])):
        with pytest.raises(InvalidInputError, match=f"devices {', '.join(map(str, group))} cannot form"):
            call(group)


def test_a_tp_outside_the_map_is_refused() -> None:
    vmap = VshardMap(8, 2)
    for tp in (1, 16):
        with pytest.raises(PreconditionError, match="use tp2 to tp8"):
            vmap.vshards_of(0, tp)
    for tp in (0, 3, -2):
        with pytest.raises(InvalidInputError, match=f"tp{tp} is not a power of two"):
            vmap.slots(tp)
    with pytest.raises(InvalidInputError):
        vmap.check_group(())


@pytest.mark.parametrize("vshard", [-1, 4])
def test_a_vshard_that_is_not_there(vshard: int) -> None:
    with pytest.raises(ValueError, match="outside 0 to 3"):
        VshardMap(4).device_of((0, 1), vshard)
