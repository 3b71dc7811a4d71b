"""Layouts: their text form, their validation, and the enumeration of all of them."""

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError, NitsumError, PreconditionError
from nitsum_jax.meshes.layout import (
    TIER_NAME,
    InstanceSpec,
    Layout,
    Role,
    Shape,
    enumerate_layouts,
    parse_layout,
    parse_shapes,
    shapes_text,
)
from nitsum_jax.meshes.vshards import ranks_differ


def layout_of(*groups: tuple[int, ...]) -> Layout:
    return Layout(tuple(InstanceSpec(group) for group in groups))


names = st.from_regex(TIER_NAME, fullmatch=True) | st.sampled_from(["chat", "code", "64", "tp1", "x2", "Decode"])
tiers = st.lists(names, max_size=2, unique=True).map(tuple)
shapes = st.builds(Shape, st.sampled_from([1, 2, 4, 8]), st.sampled_from([role.value for role in Role]), tiers)


@st.composite
def cells(draw: st.DrawFn) -> tuple[int, Layout]:
    """A cell and any valid layout of it, also with scattered devices, idle ones, roles and tiers."""
    num_devices = draw(st.integers(1, 16))
    free = set(range(num_devices))
    instances: list[InstanceSpec] = []
    for tp in draw(st.lists(st.sampled_from([1, 1, 2, 2, 4, 8]), min_size=1, max_size=8)):
        by_rank = [[d for d in sorted(free) if d % tp == rank] for rank in range(tp)]
        if all(by_rank):
            devices = tuple(draw(st.sampled_from(choice)) for choice in by_rank)
            free -= set(devices)
            instances.append(InstanceSpec(devices, draw(st.sampled_from(list(Role))), draw(tiers)))
    roles = {instance.role for instance in instances}
    if Role.MIXED not in roles and len(roles) < 2:
        instances = [InstanceSpec(instance.devices, tiers=instance.tiers) for instance in instances]
    return num_devices, Layout(tuple(instances or [InstanceSpec((0,))]))


@given(cells())
def test_text_round_trip(cell: tuple[int, Layout]) -> None:
    num_devices, layout = cell
    layout.validate(num_devices, max_tp=8)
    assert parse_layout(str(layout), num_devices) == layout
    assert str(parse_layout(str(layout), num_devices)) == str(layout)


@given(cells())
def test_naming_all_devices_says_the_same(cell: tuple[int, Layout]) -> None:
    num_devices, layout = cell
    assert parse_layout("+".join(map(str, layout.instances)), num_devices) == layout


@given(st.lists(shapes, min_size=1, max_size=8).map(tuple))
def test_shapes_are_read_as_they_were_written(wanted: tuple[Shape, ...]) -> None:
    assert parse_shapes(shapes_text(wanted)) == wanted


@given(cells())
def test_shapes_of_a_layout_are_what_its_text_says(cell: tuple[int, Layout]) -> None:
    _, layout = cell
    assert parse_shapes(str(layout)) == layout.shapes
    assert layout.without_tiers().tiers == ()


@given(st.integers(1, 8), st.booleans())
def test_enumerated_layouts_need_no_devices_in_their_text(num_devices: int, roles: bool) -> None:
    for layout in itertools.islice(enumerate_layouts(num_devices, 8, roles=roles), 200):
        assert "@" not in str(layout)
        assert parse_layout(str(layout), num_devices) == layout


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("tp4", [(0, 1, 2, 3)]),
        ("tp2+tp1x2", [(0, 1), (2,), (3,)]),
        ("tp1+tp2+tp1", [(0,), (1, 2), (3,)]),
        ("tp1", [(0,)]),
        ("tp2@2,3+tp1x2", [(2, 3), (0,), (1,)]),
        ("tp1@1+tp2", [(1,), (2, 3)]),
        ("tp2@0,3", [(0, 3)]),
        ("tp1x2@3,1", [(3,), (1,)]),
        ("tp2@3,2", [(2, 3)]),
        (" TP2 + tp1X2:MIXED ", [(0, 1), (2,), (3,)]),
    ],
)
def test_devices_are_assigned_from_left_to_right(text: str, groups: list[tuple[int, ...]]) -> None:
    assert parse_layout(text, 4) == layout_of(*groups)


def test_roles_are_read() -> None:
    layout = parse_layout("tp2:prefill+tp1x2:decode", 4)
    assert layout.instances == (
        InstanceSpec((0, 1), Role.PREFILL),
        InstanceSpec((2,), Role.DECODE),
        InstanceSpec((3,), Role.DECODE),
    )


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("tp1+tp1+tp1+tp1", "tp1x4"),
        ("tp2x1:mixed", "tp2"),
        ("tp1+tp2+tp1", "tp1+tp2+tp1"),
        ("tp1:decode+tp1:decode+tp2:prefill", "tp1x2:decode+tp2:prefill"),
        ("tp2@2,3+tp1@0+tp1@1", "tp2@2,3+tp1x2"),
        ("tp2@0,1+tp2@2,3", "tp2x2"),
        ("tp1@3+tp1@2", "tp1@3+tp1@2"),
        ("tp2@0,3:prefill+tp1x2:decode", "tp2@0,3:prefill+tp1x2:decode"),
        ("TP1/chat+tp1:MIXED/chat+tp2:mixed/code,Batch", "tp1x2/chat+tp2/code,Batch"),
        ("tp1/chat+tp1/code+tp1x2", "tp1/chat+tp1/code+tp1x2"),
        ("tp2@2,3:prefill/a+tp1x2:decode/a,b", "tp2@2,3:prefill/a+tp1x2:decode/a,b"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(parse_layout(text, 4)) == canonical


def test_an_instance_knows_its_tp_and_text() -> None:
    instance = InstanceSpec((5, 4), Role.DECODE)
    assert instance.tp == 2
    assert instance.devices == (4, 5)
    assert str(instance) == "tp2@4,5:decode"
    assert instance == InstanceSpec((4, 5), Role.DECODE)


def test_idle_devices() -> None:
    layout = parse_layout("tp2@4,5+tp1", 8)
    assert layout.devices == (0, 4, 5)
    assert layout.idle(8) == (1, 2, 3, 6, 7)
    assert parse_layout("tp4x2", 8).idle(8) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "layout is empty"),
        ("  ", "layout is empty"),
        ("tp2+", "'' is not part of a layout: write instances as tpT"),
        ("2x2", "'2x2' is not part"),
        ("tp2 tp1", "'tp2 tp1' is not part"),
        ("tp-1", "'tp-1' is not part"),
        ("tp²", "is not part"),
        ("tp1xx2", "is not part"),
        ("tp2@", "is not part"),
        ("tp2@0;1", "is not part"),
        ("tp2:", "is not part"),
        ("tp1" * 100, r"'(tp1){19}\.\.\.' is not part"),
        ("tp1+" * 5000, "characters, more than"),
        ("tp0", "tp0 is not a power of two"),
        ("tp3", "tp3 is not a power of two"),
        ("tp2+tp6", "tp6 is not a power of two"),
        ("tp1x0", "asks for no instance"),
        ("tp2/", "is not part"),
        ("tp2/chat;code", "'tp2/chat;code' is not part of a layout: write instances as tpT.*tp4/chat"),
        ("tp2/-chat", "is not part"),
        ("tp2/chat:decode", "is not part"),
        ("tp2/chat,chat", "names a tier twice"),
        ("tp2:encode", "unknown role: use mixed, prefill, decode"),
        ("tp2@1", "names 1 devices but needs 2"),
        ("tp1x3@1,2", "names 2 devices but needs 3"),
        ("tp2@1,1", "names device 1 2 times"),
        ("tp1@1+tp2@1,2", "names device 1 2 times"),
        ("tp2@0,2", "tp2@0,2 would hold the same vshards"),
        ("tp1@1+tp1@2+tp2", "leaves no 2 free neighbours"),
        ("tp4:prefill", "no instance to decode"),
        ("tp1x4:decode", "no instance to prefill"),
    ],
)
def test_malformed_text(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        parse_layout(text, 4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["tp8", "tp4+tp1", "tp1x5", "tp1x999999", "tp524288x999999", "tp2@3,4", "tp1@999999"])
def test_more_devices_than_there_are(text: str) -> None:
    with pytest.raises(PreconditionError, match=r"needs more than the 4 devices|but the cell has 4"):
        parse_layout(text, 4)


@pytest.mark.parametrize("text", ["tp1x999999+tp1x999999", "tp524288x999999"])
def test_shapes_have_an_end_too(text: str) -> None:
    with pytest.raises(PreconditionError, match="needs more than the 1048576 devices"):
        parse_shapes(text)


@given(st.text(alphabet="tp0123489x@,:+/ prefilldco", max_size=20))
def test_any_text_is_a_layout_or_a_one_line_error(text: str) -> None:
    outcome: Layout | NitsumError
    try:
        outcome = parse_layout(text, 8)
    except NitsumError as error:
        outcome = error
    if isinstance(outcome, Layout):
        assert parse_layout(str(outcome), 8) == outcome
    assert "\n" not in str(outcome)


@pytest.mark.parametrize(
    ("layout", "kind", "message"),
    [
        (Layout(()), InvalidInputError, "has no instance"),
        (layout_of(()), InvalidInputError, "tp0 is not a power of two"),
        (layout_of((0, 1, 2)), InvalidInputError, "tp3 is not a power of two"),
        (layout_of((0, 1), (1,)), InvalidInputError, "device 1 2 times"),
        (layout_of((4,)), PreconditionError, "device 4, but the cell has 4"),
        (layout_of((-1,)), PreconditionError, "device -1, but the cell has 4"),
        (layout_of((0, 1, 2, 3)), PreconditionError, "has tp4, but this model on this cell runs tp1 to tp2"),
        (layout_of((1, 3)), InvalidInputError, "same vshards"),
    ],
)
def test_validate(layout: Layout, kind: type[NitsumError], message: str) -> None:
    with pytest.raises(kind, match=message):
        layout.validate(4, max_tp=2)


def test_validate_holds_the_smallest_tp() -> None:
    layout = parse_layout("tp2+tp1x2", 4)
    layout.validate(4, max_tp=2)
    with pytest.raises(PreconditionError, match="has tp1, but this model on this cell runs tp2 to tp4"):
        layout.validate(4, max_tp=4, min_tp=2)


def signature(layout: Layout) -> tuple[tuple[int, Role], ...]:
    return tuple(sorted((instance.tp, instance.role) for instance in layout.instances))


def brute_force(num_devices: int, kinds: list[tuple[int, Role]]) -> set[tuple[tuple[int, Role], ...]]:
    """All multisets of kinds that use as many devices as any does, found the slow way."""
    most = num_devices - num_devices % min(tp for tp, _ in kinds)
    found = set()
    for size in range(1, num_devices + 1):
        for chosen in itertools.combinations_with_replacement(sorted(kinds), size):
            roles = {role for _, role in chosen}
            if sum(tp for tp, _ in chosen) == most and (Role.MIXED in roles or len(roles) == 2):
                found.add(chosen)
    return found


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize(
    ("num_devices", "max_tp", "min_tp"),
    [(1, 1, 1), (2, 2, 1), (3, 4, 1), (4, 4, 1), (4, 2, 1), (5, 4, 2), (6, 8, 2), (8, 8, 2), (8, 6, 4), (7, 3, 2)],
)
def test_enumeration_is_complete(num_devices: int, max_tp: int, min_tp: int, roles: bool) -> None:
    tps = [tp for tp in (1, 2, 4, 8) if min_tp <= tp <= min(max_tp, num_devices)]
    kinds = [(tp, role) for tp in tps for role in (Role if roles else [Role.MIXED])]
    layouts = list(enumerate_layouts(num_devices, max_tp, min_tp, roles))
    counts = collections.Counter(signature(layout) for layout in layouts)
    assert set(counts) == brute_force(num_devices, kinds)
    assert set(counts.values()) == {1}
    for layout in layouts:
        layout.validate(num_devices, max_tp, min_tp)
        assert len(layout.idle(num_devices)) == num_devices % min_tp
        assert all(ranks_differ(instance.devices) for instance in layout.instances)


def test_enumeration_of_eight_devices() -> None:
    texts = [str(layout) for layout in enumerate_layouts(8, 8)]
    assert texts == [
        "tp8",
        "tp4x2",
        "tp4+tp2x2",
        "tp4+tp2+tp1x2",
        "tp4+tp1x4",
        "tp2x4",
        "tp2x3+tp1x2",
        "tp2x2+tp1x4",
        "tp2+tp1x6",
        "tp1x8",
    ]


def test_enumeration_is_lazy() -> None:
    assert str(next(enumerate_layouts(1024, 64))) == "tp64x16"


def test_enumeration_of_nothing() -> None:
    with pytest.raises(PreconditionError, match="no layout is possible"):
        enumerate_layouts(2, 8, min_tp=4)
    with pytest.raises(PreconditionError, match="no layout is possible"):
        enumerate_layouts(4, 0)
    with pytest.raises(InvalidInputError, match="tp3 is not a power of two"):
        enumerate_layouts(8, 8, min_tp=3)
