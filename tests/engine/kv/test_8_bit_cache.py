"""Keys and values in 8 bits: how near they stay, and what is broken stays broken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nitsum_jax.engine.step.attention import PoolShape, contained, decode, encode
from nitsum_jax.engine.step.forms import PoolForm
from tests.engine.step.attention_cases import int8_rows, of_int8_rows

WIDTH = 16
SHAPE, FLOAT8 = (PoolShape(1, 1, 1, 1, WIDTH, dtype) for dtype in ("int8", "float8_e4m3"))
write, read = (jax.jit(functools.partial(one, shape=SHAPE)) for one in (encode, decode))
write_float8, read_float8 = (jax.jit(functools.partial(one, shape=FLOAT8)) for one in (encode, decode))

# XLA:CPU takes numbers below the smallest normal one for 0.
sizes = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
ROWS = arrays.arrays(np.float32, (4, WIDTH), elements=sizes)


@given(ROWS)
def test_a_number_is_off_by_half_a_step_and_a_step_is_the_largest_over_127(values: np.ndarray) -> None:
    step = np.abs(values).max(axis=-1, keepdims=True).astype(np.float64) / 127 * (1 + 2**-7)
    error = np.abs(np.asarray(read(write(values))).astype(np.float64) - values)
    assert (error <= np.maximum(step / 2, 2.0**-126)).all()


def test_rows_are_integers_and_a_bfloat16() -> None:
    values = np.random.default_rng(0).standard_normal((200, WIDTH)).astype(np.float32)
    stored = np.asarray(write(values))
    assert stored.shape == (200, WIDTH + 2)
    assert stored.dtype == np.int8
    np.testing.assert_array_equal(stored, int8_rows(values))
    np.testing.assert_array_equal(read(stored), of_int8_rows(stored))


@pytest.mark.parametrize("size", [0.0, 1e-38, 3.3e38])
def test_the_ends_of_the_range(size: float) -> None:
    values = np.full((1, WIDTH), size, np.float32)
    np.testing.assert_allclose(read(write(values)), values, rtol=2**-7, atol=2.0**-126)


def test_a_broken_token_stays_broken() -> None:
    k, v = contained(jnp.full((1, WIDTH), jnp.inf), jnp.ones((1, WIDTH)))
    assert np.isnan(read(write(k))).all()
    np.testing.assert_array_equal(read(write(v)), 0)


@pytest.mark.parametrize("as_integers", [True, False])
def test_float8_is_stored_as_its_bits(as_integers: bool) -> None:
    shape = dataclasses.replace(FLOAT8, form=PoolForm(as_integers=as_integers))
    values = np.random.default_rng(1).standard_normal((50, WIDTH)).astype(np.float32)
    stored = np.asarray(jax.jit(functools.partial(encode, shape=shape))(values))
    assert stored.dtype == shape.storage_dtype
    expected = values.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(stored.view(np.uint8), expected.view(np.uint8))
    np.testing.assert_array_equal(jax.jit(functools.partial(decode, shape=shape))(stored), expected.astype(np.float32))


def test_what_float8_cannot_hold_is_the_largest_it_can_and_nan_stays() -> None:
    values = np.array([[1e30, -1e30, 449.0, np.nan] * (WIDTH // 4)], np.float32)
    got = np.asarray(read_float8(write_float8(values)))
    np.testing.assert_array_equal(got[0, :4], [448, -448, 448, np.nan])
