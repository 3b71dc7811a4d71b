import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from nitsum_jax.control.model.corrected_cost import CorrectedCost
from nitsum_jax.control.model.cost_model import NO_LIMIT, CostModel
from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.control.model.profile import Profile
from nitsum_jax.errors import InvalidInputError
from tests.control.profiles import roofline_profile, with_times


def rising(steps: list[float]) -> tuple[float, ...]:
    return tuple(np.cumsum(steps).tolist())


def plane(rows: tuple[int, ...], columns: tuple[int, ...], steps: list[float]) -> Plane:
    """Monotone and without falling slopes: a cumulative sum of non-negative steps along both axes."""
    values = np.cumsum(np.cumsum(np.reshape(steps, (len(rows), len(columns))), axis=0), axis=1)
    return Plane(rows, columns, tuple(map(tuple, values.tolist())))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Profiles of one TP with any monotone tables on small grids."""

    def axis(first: int) -> tuple[int, ...]:
        return (first, *sorted(draw(st.sets(st.integers(first + 1, 60), min_size=1, max_size=4))))

    def steps(count: int) -> list[float]:
        return draw(st.lists(st.floats(0, 1).map(lambda x: round(x, 6)), min_size=count, max_size=count))

    tokens, head, sequences, context, new, before = axis(1), axis(1), axis(1), axis(0), axis(1), axis(0)
    profile = with_times(
        roofline_profile((1,)),
        1,
        dense=Line(tokens, rising(steps(len(tokens)))),
        head=Line(head, rising(steps(len(head)))),
        decode_attention=plane(sequences, context, steps(len(sequences) * len(context))),
        prefill_attention=plane(new, before, steps(len(new) * len(before))),
    )
    return dataclasses.replace(profile, mixed_steps=draw(st.booleans()))


SEQUENCES = st.integers(0, 80)
CONTEXT = st.integers(0, 8000)
CHUNKS = st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), max_size=3)


def by_scipy(profile: Profile, sequences: int, context: int, chunks: list[tuple[int, int]]) -> float:
    """The documented sum, by numpy and scipy on the tables."""
    times = profile.tps[1]

    def line(table: Line, x: float) -> float:
        return float(
            RegularGridInterpolator((table.points,), table.seconds, bounds_error=False, fill_value=None)([x])[0]
        )

    def surface(table: Plane, y: float, x: float) -> float:
        grid = RegularGridInterpolator((table.rows, table.columns), table.seconds, bounds_error=False, fill_value=None)
        return float(grid([[y, x]])[0])

    if chunks and not profile.mixed_steps and (sequences or len(chunks) > 1):
        decode = by_scipy(profile, sequences, context, [])
        return decode + sum(by_scipy(profile, 0, 0, [chunk]) for chunk in chunks)
    total = sequences + sum(new for new, _ in chunks)
    if not total:
        return 0.0
    seconds = profile.host_overhead_s + line(times.dense, total) + line(times.head, sequences + len(chunks))
    if sequences:
        seconds += surface(times.decode_attention, sequences, context / sequences)
    return seconds + sum(surface(times.prefill_attention, new, before) for new, before in chunks)


@given(profiles(), SEQUENCES, CONTEXT, CHUNKS)
def test_step_is_the_documented_sum(
    profile: Profile, sequences: int, context: int, chunks: list[tuple[int, int]]
) -> None:
    expected = by_scipy(profile, sequences, context, chunks)
    assert CostModel(profile).step_s(1, sequences, context, chunks) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(profiles(), st.integers(1, 80), CONTEXT, st.data())
def test_decode_segment_is_the_line_of_step_s(
    profile: Profile, sequences: int, context: int, data: st.DataObject
) -> None:
    model = CostModel(profile)
    seconds, slope, last = model.decode_segment(1, sequences, context)
    assert last > context
    assert seconds == model.step_s(1, sequences, context)
    at = data.draw(st.integers(context, min(last, context + 5000)))
    assert seconds + slope * (at - context) == pytest.approx(model.step_s(1, sequences, at), rel=1e-9, abs=1e-12)


@given(profiles(), st.integers(1, 80))
def test_segments_end_at_the_last_one(profile: Profile, sequences: int) -> None:
    model = CostModel(profile)
    context, count = 0, 0
    while context < NO_LIMIT:
        context = model.decode_segment(1, sequences, context)[2]
        count += 1
    assert count == len(profile.tps[1].decode_attention.columns) - 1


@given(profiles(), SEQUENCES, CONTEXT, CHUNKS, st.integers(1, 40), st.integers(0, 40), st.integers(0, 40))
def test_more_work_never_takes_less(
    profile: Profile,
    sequences: int,
    context: int,
    chunks: list[tuple[int, int]],
    new: int,
    before: int,
    more: int,
) -> None:
    model = CostModel(profile)
    less = model.step_s(1, sequences, context, [*chunks, (new, before)]) * (1 - 1e-9) - 1e-12
    assert model.step_s(1, sequences, context + more, [*chunks, (new, before)]) >= less
    assert model.step_s(1, sequences, context, [*chunks, (new + more, before)]) >= less
    assert model.step_s(1, sequences, context, [*chunks, (new, before + more)]) >= less
    mean = context // max(sequences, 1)  # at the same mean context, or attention spreads thinner
    few = model.step_s(1, sequences, mean * sequences, chunks) * (1 - 1e-9) - 1e-12
    assert model.step_s(1, sequences + more, mean * (sequences + more), chunks) >= few


@settings(max_examples=200)
@given(profiles(), SEQUENCES, CONTEXT, st.integers(0, 60), st.integers(0, 120), st.floats(0, 30), CHUNKS)
def test_max_chunk_is_the_most_that_fits(
    profile: Profile,
    sequences: int,
    context: int,
    before: int,
    limit: int,
    budget: float,
    chunks: list[tuple[int, int]],
) -> None:
    model = CostModel(profile)
    most = model.max_chunk(1, sequences, context, before, limit, budget, chunks)
    assert 0 <= most <= limit
    if most:
        assert model.step_s(1, sequences, context, [*chunks, (most, before)]) <= budget
    if most < limit:
        assert model.step_s(1, sequences, context, [*chunks, (most + 1, before)]) > budget


@settings(max_examples=200)
@given(profiles(), SEQUENCES, CONTEXT, st.integers(0, 60), st.integers(1, 120), CHUNKS, st.floats(0.5, 2))
def test_a_line_of_chunks_is_the_steps_to_the_bit(
    profile: Profile,
    sequences: int,
    context: int,
    before: int,
    new: int,
    chunks: list[tuple[int, int]],
    ratio: float,
) -> None:
    corrected = CorrectedCost(profile)
    corrected.adopt({1: (ratio, 1 / ratio)})
    for model in (CostModel(profile), corrected):
        step_s = model.step_s(1, sequences, context, [*chunks, (new, before)])
        assert model.chunk_line(1, sequences, context, before, chunks)(new) == step_s


def test_prefill_is_the_sum_of_its_chunks() -> None:
    model = CostModel(roofline_profile())
    parts = [
        model.step_s(2, 0, 0, [(2048, 0)]),
        model.step_s(2, 0, 0, [(2048, 2048)]),
        model.step_s(2, 0, 0, [(904, 4096)]),
    ]
    assert model.prefill_s(2, 5000) == pytest.approx(sum(parts))
    assert model.prefill_s(2, 0) == 0.0


def test_nothing_to_do_takes_no_time() -> None:
    model = CostModel(roofline_profile())
    assert model.step_s(1, 0, 0) == 0.0
    assert model.decode_segment(1, 0, 0) == (0.0, 0.0, NO_LIMIT)
    assert model.transfer_s(0, 1, 1) == 0.0


def test_separate_steps_cost_the_sum_of_both() -> None:
    mixed, apart = (CostModel(roofline_profile(mixed_steps=m)) for m in (True, False))
    both = apart.step_s(2, 8, 4000, [(512, 0)])
    assert both == apart.step_s(2, 8, 4000) + apart.step_s(2, 0, 0, [(512, 0)])
    assert mixed.step_s(2, 8, 4000, [(512, 0)]) < both
    assert mixed.step_s(2, 8, 4000) == apart.step_s(2, 8, 4000)


def test_transfer_runs_over_the_links_of_the_smaller_group() -> None:
    model = CostModel(roofline_profile())
    bytes_ = 1000 * 131_072
    assert model.transfer_s(1000, 1, 4) == pytest.approx(20e-6 + bytes_ / 250e9)
    assert model.transfer_s(1000, 4, 2) == pytest.approx(20e-6 + bytes_ / 2 / 250e9)
    assert model.transfer_s(1000, 4, 2, pairs=2) == pytest.approx(20e-6 + bytes_ / 4 / 250e9)


def test_switch_is_host_and_busiest_link() -> None:
    model = CostModel(roofline_profile())
    assert model.switch_s(0) == 0.002
    assert model.switch_s(250e6) == pytest.approx(0.002 + 20e-6 + 1e-3)


def test_resident_weights_take_room_from_the_cache() -> None:
    model = CostModel(roofline_profile())
    alone = model.kv_capacity_tokens(4)
    assert model.kv_capacity_tokens(4, resident_tp=4) == alone
    # Each of the 4 devices keeps all 16 GB, not 4 GB.
    assert model.kv_capacity_tokens(4, resident_tp=1) == pytest.approx((4 * 72e9 - 4 * 16e9) / 131_072, abs=2)
    assert model.kv_capacity_tokens(4, resident_tp=2) == pytest.approx((4 * 72e9 - 2 * 16e9) / 131_072, abs=2)
    assert model.kv_capacity_tokens(1, resident_tp=2) == model.kv_capacity_tokens(1)


def test_unknown_tp_is_named() -> None:
    model = CostModel(roofline_profile((2, 4)))
    for call in (
        lambda: model.step_s(8, 1, 1),
        lambda: model.decode_segment(8, 1, 1),
        lambda: model.kv_capacity_tokens(8),
    ):
        with pytest.raises(InvalidInputError, match="profile roofline has no TP 8: use one of 2, 4"):
            call()


def test_a_model_that_stays_with_its_profile_is_told_of_steps_like_one_that_learns() -> None:
    plain, learning = CostModel(roofline_profile()), CorrectedCost(roofline_profile())
    tp, before = plain.tps[0], plain.step_s(plain.tps[0], 8, 4000)
    for cost in (plain, learning):
        cost.observe(tp, 2 * before, 8, 4000)
    assert (plain.step_s(tp, 8, 4000), plain.version, plain.learnt()) == (before, 0, {})
    assert learning.step_s(tp, 8, 4000) == pytest.approx(2 * before)
    assert learning.version > 0
    assert learning.learnt()[tp][0] == pytest.approx(2)
