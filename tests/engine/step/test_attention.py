"""Attention over a paged pool against attention in numpy, and what makes it independent of layout and batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.engine.step.attention import (
    PoolShape,
    contained,
    decode,
    encode,
    exp_nonpositive,
    paged_attention,
    write_tokens,
)
from nitsum_jax.engine.step.forms import PoolForm, step_forms
from tests.engine.step.attention_cases import LAYERS, AttentionCase

WIDTH = 8


class Case(AttentionCase):
    """Attention as steps have it on a CPU without a kernel."""

    def run(self, layer: int) -> np.ndarray:
        return np.asarray(compiled(self.shape, layer, *map(jax.typeof, self.arrays))(*self.arrays))


BY_ROWS = PoolForm(by_rows=True)
ON_TPU = step_forms("tpu", "bfloat16").pool


@functools.cache
def compiled(shape: PoolShape, layer: int, *arrays: jax.ShapeDtypeStruct) -> jax.stages.Compiled:
    """As steps are compiled on a CPU."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, *where: jax.Array) -> jax.Array:
        page_table, context = where
        return paged_attention(q, k, v, pool, layer, page_table, context, shape)

    return jax.jit(attend).lower(*arrays).compile(dict(step_forms("cpu", shape.dtype).compile_options) or None)


make_case = functools.partial(Case.draw, slots=2, width=WIDTH)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(make_case([0, 1, 15, 16, 17]), id="decode around a page"),
        pytest.param(make_case([127, 128, 129, 300]), id="decode around a chunk"),
        pytest.param(make_case([5], slots=1, heads=1, groups=1), id="a single row of a single head"),
        pytest.param(make_case([40, 200], heads=3, groups=1), id="multi-query"),
        pytest.param(make_case([40, 130], heads=2, groups=2), id="multi-head"),
        pytest.param(make_case([0], length=33), id="first prefill chunk"),
        pytest.param(make_case([150], length=20, heads=3, groups=1), id="later prefill chunk"),
        pytest.param(make_case([100, 3], length=4), id="several new tokens in a batch"),
        pytest.param(make_case([70, 3], page_size=1), id="pages of one token"),
        pytest.param(make_case([130, 3], page_size=128), id="pages of a whole chunk"),
        pytest.param(make_case([140, 9], dtype="bfloat16"), id="bfloat16 pool"),
        pytest.param(make_case([140, 9], form=BY_ROWS), id="pages of rows"),
        pytest.param(make_case([140, 9], dtype="bfloat16", form=ON_TPU), id="as on a TPU"),
        pytest.param(make_case([140, 9], dtype="int8"), id="int8 pool"),
        pytest.param(make_case([140, 9], length=5, dtype="int8", form=BY_ROWS), id="int8 pool of rows"),
        pytest.param(make_case([140, 9], dtype="float8_e4m3"), id="float8 pool"),
        pytest.param(make_case([140, 9], length=5, dtype="float8_e4m3", form=ON_TPU), id="float8 pool, as on a TPU"),
        pytest.param(make_case([600, 9], form=PoolForm(chunk_tokens=512)), id="large chunks"),
    ],
)
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_it_is_attention(case: Case, layer: int) -> None:
    np.testing.assert_allclose(case.run(layer), case.expected(layer), rtol=0, atol=1e-5)


def test_a_row_gets_the_same_bits_whoever_else_is_in_the_batch() -> None:
    # The longest context decides how many chunks all rows go through.
    case = make_case([20, 120, 400])
    together = case.run(1)
    for row in range(3):
        others = case.context.copy()
        others[[r for r in range(3) if r != row]] = 0
        np.testing.assert_array_equal(dataclasses.replace(case, context=others).run(1)[row], together[row])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(make_case([200], slots=8, heads=2, groups=1), id="decode"),
        pytest.param(make_case([200], length=8, slots=8, heads=2, groups=1), id="prefill"),
        pytest.param(make_case([200], slots=8, heads=2, groups=1, dtype="float8_e4m3"), id="float8 pool"),
        # Sizes at which XLA:CPU compiles the loop over old tokens, or the product with the new ones, in another way.
        pytest.param(make_case([300] * 16, slots=8, heads=1, groups=1), id="multi-head"),
        pytest.param(make_case([20] * 8, slots=8, heads=1, groups=1, width=64), id="multi-head, wide"),
    ],
)
def test_a_vshard_alone_on_its_device_gets_the_bits_it_gets_in_company(case: Case) -> None:
    together = case.run(0)
    for size in (1, 2, 4):
        for first in range(0, 8, size):
            part = slice(first, first + size)
            alone = dataclasses.replace(
                case,
                q=case.q[:, :, part],
                k=case.k[:, :, part],
                v=case.v[:, :, part],
                page_table=case.page_table[:, part],
            )
            np.testing.assert_array_equal(alone.run(0), together[:, :, part])


def test_blocks_behind_the_context_are_not_seen() -> None:
    case = make_case([20, 130])
    expected = case.run(0)
    stale = case.pool.copy()
    for row, pages in ((0, 2), (1, 9)):  # 20 tokens lie in 2 pages, 130 in 9
        stale[case.page_table[row, :, pages:]] = np.nan
    changed = dataclasses.replace(case, pool=np.where(np.isnan(stale), np.float32(1e30), stale))
    np.testing.assert_array_equal(changed.run(0), expected)


@pytest.mark.parametrize("length", [1, 8])
def test_a_broken_token_reaches_those_that_see_it_and_nobody_else(length: int) -> None:
    """It may lie in a block that somebody else had before, behind the context, or in the new tokens of another row."""
    case = make_case([20, 130, 40], length=length)
    expected = case.run(0)
    for which in ("k", "v"):
        for value in (np.nan, np.inf, -np.inf, 3.4e38):
            new = {"k": case.k.copy(), "v": case.v.copy()}
            new[which][0, -1, 0, 0, 3] = value  # the last new token of the first row, and one of its heads
            pool = case.pool.copy()
            # What such a token leaves behind in the pool: in a block of nobody's context, and in one of the last row's.
            left_k, left_v = map(np.asarray, contained(jnp.full(WIDTH, value, jnp.float32), jnp.ones(WIDTH)))
            assert np.isnan(left_k).all()
            assert np.isfinite(left_v).all()
            for block in (case.page_table[1, 0, -1], case.page_table[2, 0, 0]):
                pool[block, 0, 0, 5], pool[block, 0, 1, 5] = left_k, left_v
            k, v = map(np.asarray, contained(jnp.asarray(new["k"]), jnp.asarray(new["v"])))
            got = dataclasses.replace(case, k=k, v=v, pool=pool).run(0)
            np.testing.assert_array_equal(got[1], expected[1])
            np.testing.assert_array_equal(got[0, :-1], expected[0, :-1])
            assert np.isnan(got[0, -1, 0]).any()
            assert np.isnan(got[2, :, 0]).any(axis=(-1, -2)).all()


# ---- exponential and sum


def ulps(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.abs(actual.astype(np.float64) - exact) / np.spacing(exact.astype(np.float32)).astype(np.float64)


def test_exp_is_right_to_two_units_in_the_last_place() -> None:
    x = -np.concatenate([np.linspace(0, 87, 400_001), np.logspace(-30, 1.9, 100_001)]).astype(np.float32)
    actual = np.asarray(jax.jit(exp_nonpositive)(jnp.asarray(x)))
    assert ulps(actual, np.exp(x.astype(np.float64))).max() <= 2


def test_exp_at_the_ends() -> None:
    x = jnp.asarray(np.array([0.0, -0.0, -87.0, -87.001, -1000.0, -np.inf], np.float32))
    y = np.asarray(jax.jit(exp_nonpositive)(x))
    np.testing.assert_array_equal(y[:2], 1)
    assert y[2] > 0
    np.testing.assert_array_equal(y[3:], 0)


def test_exp_gives_the_same_bits_in_arrays_of_every_size() -> None:
    x = -np.random.default_rng(0).exponential(10, 4096).astype(np.float32)
    whole = np.asarray(jax.jit(exp_nonpositive)(jnp.asarray(x)))
    for size in (1, 2, 3, 7, 8, 9, 31, 64, 1000):
        np.testing.assert_array_equal(jax.jit(exp_nonpositive)(jnp.asarray(x[:size])), whole[:size])


# ---- writing


def test_bfloat16_is_stored_as_its_bits() -> None:
    shape = PoolShape(1, 1, 1, 1, 4, "bfloat16")
    values = np.array([1.0, -2.5, 3.14159, 1e-30], np.float32)
    stored = encode(jnp.asarray(values), shape)
    assert stored.dtype == jnp.uint16
    expected = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(stored), expected.view(np.uint16))
    np.testing.assert_array_equal(decode(stored, shape), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "form"),
    [
        ("float32", PoolForm()),
        ("bfloat16", PoolForm()),
        ("float32", BY_ROWS),
        ("bfloat16", BY_ROWS),
        ("bfloat16", ON_TPU),
        ("int8", PoolForm()),
        ("int8", BY_ROWS),
        ("float8_e4m3", PoolForm()),
        ("float8_e4m3", ON_TPU),
    ],
)
@given(data=st.data())
def test_tokens_are_written_where_the_table_says_and_nowhere_else(
    dtype: str, form: PoolForm, data: st.DataObject
) -> None:
    batch, length, slots, page_size, pages = 3, 5, 2, 4, 6
    shape = PoolShape(batch * slots * pages + 2, LAYERS, page_size, 1, WIDTH, dtype, form)
    counts = np.array(data.draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch)), np.int32)
    limit = pages * page_size
    context = np.array([data.draw(st.integers(0, limit - int(count))) for count in counts], np.int32)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    page_table = rng.permutation(shape.blocks)[: batch * slots * pages].reshape(batch, slots, pages).astype(np.int32)
    before = np.zeros((shape.blocks, *shape.block_shape), shape.storage_dtype)
    new = rng.standard_normal((batch, length, slots, LAYERS, 2, 1, WIDTH)).astype(np.float32)
    after = np.asarray(write(shape)(*map(jnp.asarray, (before, new, page_table, context, counts))))
    expected = before.copy()
    encoded = np.asarray(encode(jnp.asarray(new), shape))
    for b, s in np.ndindex(batch, slots):
        for t in range(counts[b]):  # the rest is padding
            position = context[b] + t
            block = page_table[b, s, position // page_size]
            expected[block, :, :, position % page_size] = encoded[b, t, s]
    np.testing.assert_array_equal(after, expected)


@functools.cache
def write(shape: PoolShape) -> "jax.stages.Wrapped":
    return jax.jit(functools.partial(write_tokens, shape=shape))


def test_the_table_has_whole_chunks() -> None:
    shape = PoolShape(1, 1, 16, 1, 4, "float32")
    assert shape.chunk_pages * shape.page_size == PoolForm().chunk_tokens
    assert [shape.pages(tokens) for tokens in (1, 128, 129, 256)] == [8, 8, 16, 16]
    assert PoolShape(1, 1, 128, 1, 4, "float32").pages(129) == 2
    assert shape.block_bytes == 1 * 2 * 16 * 1 * 4 * 4
    assert PoolShape(1, 3, 16, 2, 4, "int8").block_bytes == 3 * 2 * 16 * 2 * (4 + 2)
    assert PoolShape(1, 3, 16, 2, 4, "bfloat16").block_bytes == 3 * 2 * 16 * 2 * 4 * 2
