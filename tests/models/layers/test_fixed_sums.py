"""Sums that are the same to the bit in any array and any fusion, against sums in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.models.layers.fixed_sums import largest, squares_by_integers, sum_of_squares, sum_of_weights


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 33, 128, 1000])
def test_weights_add_up(size: int) -> None:
    x = np.random.default_rng(size).random((40, size), np.float32)
    x[0], x[1] = 0, 1
    total = np.asarray(jax.jit(sum_of_weights)(jnp.asarray(x)))
    np.testing.assert_allclose(total, x.astype(np.float64).sum(-1), rtol=1e-6, atol=1e-6)
    assert total[0] == 0
    assert total[1] == size


def in_order(x: np.ndarray) -> np.ndarray:
    """The sum over the last axis as `fixed_sums` says that it is made on a CPU, one addition after the other."""
    while x.shape[-1] > 32:
        length = max(32, -(-x.shape[-1] // 32))
        rows = -(-x.shape[-1] // length)
        x = np.pad(x, ((0, 0), (0, rows * length - x.shape[-1]))).reshape(len(x), rows, length)
        x = np.add.accumulate(x, axis=1)[:, -1]
    return np.asarray(np.add.accumulate(x, axis=1)[:, -1])


@pytest.mark.parametrize("size", [2, 5, 33, 64, 576, 1000, 4096])
def test_every_bit_is_that_of_additions_in_order(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((7, size)).astype(np.float32)
    squares = (x.astype(np.float64) ** 2).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(sum_of_squares)(jnp.asarray(x)), in_order(squares))
    np.testing.assert_array_equal(jax.jit(sum_of_weights)(jnp.asarray(abs(x))), in_order(abs(x)))


@pytest.mark.parametrize("size", [1, 2, 33, 128, 576, 4096])
def test_the_largest_is_found_in_every_place(size: int) -> None:
    x = np.tile(-np.arange(1, size + 1), (size, 1))[:50]
    x[np.arange(len(x)), np.arange(len(x)) * size // len(x)] = 5
    assert (np.asarray(jax.jit(largest)(jnp.asarray(x, jnp.int32))) == 5).all()
    assert (np.asarray(jax.jit(largest)(jnp.asarray(x, jnp.float32))) == 5).all()


@pytest.mark.parametrize("function", [sum_of_squares, squares_by_integers, sum_of_weights])
@pytest.mark.parametrize("size", [64, 576])
def test_a_broken_number_is_not_hidden(function: Callable[[jax.Array], jax.Array], size: int) -> None:
    x = np.ones((size, size), np.float32)
    np.fill_diagonal(x, np.nan)
    assert not np.isfinite(jax.jit(function)(jnp.asarray(x))).any()


@pytest.mark.parametrize(
    ("function", "size"), [(sum_of_squares, 576), (sum_of_squares, 4096), (sum_of_weights, 128), (largest, 128)]
)
def test_it_is_one_loop_for_the_compiler(function: Callable[[jax.Array], jax.Array], size: int) -> None:
    text = jax.jit(lambda x: function(x + 1)).lower(jnp.ones((3, size))).compile().as_text() or ""
    assert text[text.index("ENTRY") :].count(" fusion(") == 1


@pytest.mark.parametrize("size", [1, 2, 7, 64, 128, 511, 512, 576, 1022, 4096])
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 3e4, 1e15])
@pytest.mark.parametrize("function", [sum_of_squares, squares_by_integers])
def test_squares_add_up(function: Callable[[jax.Array], jax.Array], size: int, scale: float) -> None:
    rng = np.random.default_rng(size)
    x = (rng.standard_normal((40, size)) * scale).astype(np.float32)
    x[0] *= rng.exponential(100, size).astype(np.float32)  # a few features far above the others
    total = np.asarray(jax.jit(function)(jnp.asarray(x)))
    np.testing.assert_allclose(total, (x.astype(np.float64) ** 2).sum(-1), rtol=1e-6)


def test_squares_by_integers_do_not_depend_on_the_order_and_lose_no_more_than_float32() -> None:
    x = np.random.default_rng(3).standard_normal((8, 40_000)).astype(np.float32)  # more than one sum of i32 holds
    x[:, 7] = 4000  # beside it, most of each number is in the lower integers
    for size in (4096, 40_000):
        rows = x[:, :size]
        total = np.asarray(jax.jit(squares_by_integers)(jnp.asarray(rows)))
        np.testing.assert_allclose(total, (rows.astype(np.float64) ** 2).sum(-1), rtol=2e-7)
    rows = x[:, :4096]
    turned = np.asarray(jax.jit(squares_by_integers)(jnp.asarray(rows[:, ::-1])))
    np.testing.assert_array_equal(turned, np.asarray(jax.jit(squares_by_integers)(jnp.asarray(rows))))


@pytest.mark.parametrize("function", [sum_of_squares, squares_by_integers])
def test_squares_at_the_ends_of_the_range(function: Callable[[jax.Array], jax.Array]) -> None:
    largest = np.float32(2 - 2**-23)  # all bits of the integers are set
    x = np.stack([np.zeros(512, np.float32), np.full(512, largest), np.full(512, -largest), np.full(512, np.nan)])
    total = np.asarray(jax.jit(function)(jnp.asarray(x)))
    np.testing.assert_allclose(total[:3], [0, 512 * 4, 512 * 4], rtol=1e-6)
    assert not np.isfinite(total[3])


@pytest.mark.parametrize("function", [sum_of_squares, squares_by_integers, sum_of_weights])
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
