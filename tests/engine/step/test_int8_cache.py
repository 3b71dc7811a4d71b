"""Keys and values in 8 bits: how near they stay, and what is broken stays broken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nitsum_jax.engine.step.attention import PoolShape, contained, decode, encode
from tests.engine.step.attention_cases import int8_rows, of_int8_rows

WIDTH = 16
SHAPE = PoolShape(1, 1, 1, 1, WIDTH, "int8")
write, read = (jax.jit(functools.partial(one, shape=SHAPE)) for one in (encode, decode))

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
