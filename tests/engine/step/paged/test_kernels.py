"""The kernels, interpreted: attention as in numpy and as in XLA, and what makes it independent of batch and layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from nitsum_jax.engine.step import attention
from nitsum_jax.engine.step.paged.kernels import KERNELS, paged_attention
from tests.engine.step.paged.cases import LAYER, Case, make_case

kernels = pytest.mark.parametrize("kernel", sorted(KERNELS))
# A bfloat16 pool has queries and weights rounded to 8 bits as well.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    return make_case(
        draw(st.lists(st.integers(0, 600), min_size=1, max_size=3)),
        length=draw(st.sampled_from([1, 1, 2, 16, 37])),
        slots=draw(st.sampled_from([1, 2])),
        heads=groups * draw(st.sampled_from([1, 2, 3, 4, 7])),
        groups=groups,
        width=draw(st.sampled_from([64, 80, 128, 256])),
        page_size=draw(st.sampled_from([8, 16, 64, 128])),
        dtype=draw(st.sampled_from(sorted(TOLERANCE))),
        window=draw(st.none() | st.integers(1, 400)),
        soft_cap=draw(st.sampled_from([None, 4.0])),
        scale=draw(st.sampled_from([None, 0.2])),
    )


@kernels
@settings(max_examples=4)
@example(case=make_case([0, 255, 256, 513], groups=1, heads=2))
@example(case=make_case([0, 300], length=70, heads=3, groups=1, window=90))
@given(case=cases())
def test_it_is_attention(kernel: str, case: Case) -> None:
    got = case.run(kernel)
    np.testing.assert_allclose(got, case.expected(LAYER), rtol=0, atol=TOLERANCE[case.shape.dtype])
    q, k, v, pool, page_table, context = case.arrays
    reference = attention.paged_attention(q, k, v, pool, LAYER, page_table, context, case.shape, case.variant)
    np.testing.assert_allclose(got, reference, rtol=0, atol=TOLERANCE[case.shape.dtype])


@kernels
@pytest.mark.parametrize("length", [1, 20])
def test_a_row_gets_the_same_bits_whoever_else_is_in_the_batch(kernel: str, length: int) -> None:
    case = make_case([20, 260, 700], length=length, groups=1, heads=2, dtype="bfloat16")
    together = case.run(kernel)
    changed = case.context.copy()
    changed[[0, 2]] = 400, 0
    np.testing.assert_array_equal(dataclasses.replace(case, context=changed).run(kernel)[1], together[1])
    alone = dataclasses.replace(
        case,
        q=case.q[1:2],
        k=case.k[1:2],
        v=case.v[1:2],
        page_table=case.page_table[1:2],
        context=case.context[1:2],
    )
    np.testing.assert_array_equal(alone.run(kernel)[0], together[1])


@kernels
@pytest.mark.parametrize(("length", "dtype"), [(1, "bfloat16"), (20, "float32")])
def test_a_vshard_gets_the_same_bits_at_every_tp(kernel: str, length: int, dtype: str) -> None:
    groups = 2 if length == 1 else 1
    case = make_case([270, 3], length=length, slots=8, dtype=dtype, groups=groups, heads=2 * groups)
    expected = None
    for tp in (1, 2, 4, 8):
        mesh = jax.make_mesh((tp,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:tp])
        cut, table, whole = PartitionSpec(None, None, "tp"), PartitionSpec(None, "tp"), PartitionSpec()
        attend = functools.partial(paged_attention, layer=LAYER, shape=case.shape, kernel=kernel, interpret=True)
        mapped = jax.shard_map(
            lambda q, k, v, pool, page_table, context, attend=attend: attend(
                q, k, v, pool, page_table=page_table, context=context
            ),
            mesh=mesh,
            in_specs=(cut, cut, cut, whole, table, whole),
            out_specs=cut,
            check_vma=False,
        )
        got = np.asarray(jax.jit(mapped)(*case.arrays))
        if expected is None:
            expected = got
            np.testing.assert_allclose(got, case.expected(LAYER), rtol=0, atol=TOLERANCE[dtype])
        np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32), f"TP {tp}")


@kernels
def test_blocks_behind_the_context_and_before_the_window_are_not_seen(kernel: str) -> None:
    case = make_case([20, 530], window=100)
    expected = case.run(kernel)
    pool = case.pool.copy()
    for row, seen in ((0, slice(0, 2)), (1, slice(26, 34))):  # 20 tokens lie in 2 pages; 431 to 529 in 26 to 33
        table = case.page_table[row]
        unseen = np.setdiff1d(table, table[:, seen])
        pool[unseen, :, 0] = np.nan
        pool[unseen, :, 1] = 1e30
    np.testing.assert_array_equal(dataclasses.replace(case, pool=pool).run(kernel), expected)


@kernels
@pytest.mark.parametrize("length", [1, 8])
def test_a_broken_token_reaches_those_that_see_it_and_nobody_else(kernel: str, length: int) -> None:
    """It may be a new one, lie in a block of nobody's context, or in the context of one row."""
    case = make_case([20, 130, 40], length=length, groups=1, heads=2)
    expected = case.run(kernel)
    k, v, pool = case.k.copy(), case.v.copy(), case.pool.copy()
    k[0, -1, 0, 0, 3] = np.inf  # the last new token of the first row, and one of its heads
    for block in (case.page_table[1, 0, -1], case.page_table[2, 0, 0]):
        pool[block, LAYER, 0, 5], pool[block, LAYER, 1, 5] = np.nan, 0
    k, v = map(np.asarray, attention.contained(jnp.asarray(k), jnp.asarray(v)))
    got = dataclasses.replace(case, k=k, v=v, pool=pool).run(kernel)
    np.testing.assert_array_equal(got[1], expected[1])
    np.testing.assert_array_equal(got[0, :-1], expected[0, :-1])
    assert np.isnan(got[0, -1, 0]).any()
    assert np.isnan(got[2, :, 0]).any(axis=(-1, -2)).all()
