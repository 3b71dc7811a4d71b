"""Sums that are the same to the bit in any array and any fusion, against sums in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.models.layers.fixed_sums import sum_of_squares, sum_of_weights


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33, 128, 1000])
def test_weights_add_up(size: int) -> None:
    x = np.random.default_rng(size).random((40, size), np.float32)
    x[0], x[1] = 0, 1
    total = np.asarray(jax.jit(sum_of_weights)(jnp.asarray(x)))
    np.testing.assert_allclose(total, x.astype(np.float64).sum(-1), rtol=1e-6, atol=1e-6)
    assert total[0] == 0
    assert total[1] == size


@pytest.mark.parametrize("size", [1, 2, 7, 64, 128, 511, 512, 576, 1022, 4096])
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1.0, 3e4, 1e15])
def test_squares_add_up(size: int, scale: float) -> None:
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((40, size)) * scale).astype(np.float32)
    x[0] *= rng.exponential(100, size).astype(np.float32)  # a few features far above the others
    total = np.asarray(jax.jit(sum_of_squares)(jnp.asarray(x)))
    np.testing.assert_allclose(total, (x.astype(np.float64) ** 2).sum(-1), rtol=1e-6)


def test_squares_at_the_ends_of_the_range() -> None:
    largest = np.float32(2 - 2**-23)  # all bits of both integers are set
    x = np.stack([np.zeros(512, np.float32), np.full(512, largest), np.full(512, -largest), np.full(512, np.nan)])
    total = np.asarray(jax.jit(sum_of_squares)(jnp.asarray(x)))
    np.testing.assert_allclose(total[:3], [0, 512 * 4, 512 * 4], rtol=1e-6)
    assert not np.isfinite(total[3])


@pytest.mark.parametrize("function", [sum_of_squares, sum_of_weights])
def test_bits_depend_neither_on_batch_nor_on_what_comes_before(function: Callable[[jax.Array], jax.Array]) -> None:
    parts = np.random.default_rng(0).random((4, 40, 576), np.float32) / 4
    whole = (parts[0] + parts[1]) + (parts[2] + parts[3])
    expected = np.asarray(jax.jit(function)(jnp.asarray(whole)))
    for rows in (1, 2, 7):
        np.testing.assert_array_equal(jax.jit(function)(jnp.asarray(whole[:rows])), expected[:rows])

    @jax.jit
    def fused(x: jax.Array) -> jax.Array:
        return function((x[0] + x[1]) + (x[2] + x[3]))

    np.testing.assert_array_equal(fused(jnp.asarray(parts)), expected)
