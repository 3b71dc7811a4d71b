"""Products with weights in 8 and 4 bits are those with the weights they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.models.checkpoint.blocks import INT4, INT8, QuantFormat, QuantisedBlocks, leaves_of, quantised
from nitsum_jax.models.layers.matmul import MatmulChoice, MatmulForm, column_parallel, embedding_rows, row_parallel
from nitsum_jax.models.layers.quantised import QuantisedForm, QuantisedWeight, _scaled, quantised_product

OUTPUTS, INPUTS = 96, 128
FORMATS = (
    INT8,
    INT4,
    QuantFormat(4, 64, True, "float32"),
    QuantFormat(8, 32, False, "float16"),
    QuantFormat(8, 16, False, "float32"),
)
SYMMETRIC = QuantFormat(4, 32, False, "float16")
RNG = np.random.default_rng(3)
VALUES = RNG.standard_normal((OUTPUTS, INPUTS)).astype(np.float32)


def weight_of(blocks: QuantisedBlocks, fmt: QuantFormat) -> tuple[QuantisedWeight, np.ndarray]:
    """The weight, and in float32 what it stands for."""
    leaves = {name: jnp.asarray(leaf) for name, leaf in leaves_of(blocks, fmt).items()}
    weight = QuantisedWeight(leaves["values"], leaves["scales"], leaves.get("minimums"), leaves.get("peaks"), fmt)
    return weight, blocks.values(centred=fmt.bits == 4)


def some(fmt: QuantFormat) -> tuple[QuantisedWeight, np.ndarray]:
    if fmt != SYMMETRIC:
        return weight_of(quantised(VALUES, fmt), fmt)
    scales = RNG.uniform(0.1, 0.3, (OUTPUTS, INPUTS // 32)).astype(np.float16).astype(np.float32)
    return weight_of(QuantisedBlocks(RNG.integers(0, 16, (OUTPUTS, INPUTS)).astype(np.uint8), scales), fmt)


@pytest.mark.parametrize("fmt", [*FORMATS, SYMMETRIC], ids=str)
def test_products_in_every_form(fmt: QuantFormat) -> None:
    weight, wide = some(fmt)
    np.testing.assert_allclose(weight.widened(), wide, rtol=0, atol=1e-6)
    np.testing.assert_allclose(embedding_rows(weight, jnp.asarray([[5, 90]])), wide[[[5, 90]]], rtol=0, atol=1e-6)
    for rows in (1, 5) if fmt is INT4 else (5,):
        x = RNG.standard_normal((rows, INPUTS)).astype(np.float32)
        expected = x.astype(np.float64) @ wide.T.astype(np.float64)
        size = np.abs(x).sum(axis=1, keepdims=True) * np.abs(wide).max(axis=1)
        whole = quantised_product(jnp.asarray(x), weight, QuantisedForm.INTEGER, "float32")
        # Rows are rounded to 16 bits; groups besides to half of 1/127 of the largest weight of a channel.
        each = 2**-15 if fmt.group == 0 else 0.51 / 127
        assert (np.abs(whole - expected) <= each * size).all()
        widened = quantised_product(jnp.asarray(x), weight, QuantisedForm.WIDENED, "float32", 8)
        np.testing.assert_allclose(widened, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_whole_numbers_do_not_depend_on_what_is_beside_a_row(fmt: QuantFormat) -> None:
    weight, _ = some(fmt)
    x = jnp.asarray(RNG.standard_normal((5, INPUTS)), jnp.float32)
    together = quantised_product(x, weight, QuantisedForm.INTEGER, "float32")
    for row in range(5):
        alone = quantised_product(x[row : row + 1], weight, QuantisedForm.INTEGER, "float32")
        np.testing.assert_array_equal(together[row : row + 1], alone)


def test_minimums_beyond_the_largest_weight_are_no_overflow() -> None:
    # No number is 0, so the minimum itself is no weight, and it is larger than any.
    numbers = RNG.integers(6, 9, (OUTPUTS, INPUTS)).astype(np.uint8)
    scales = np.full((OUTPUTS, INPUTS // 32), 0.125, np.float32)
    weight, wide = weight_of(QuantisedBlocks(numbers, scales, np.full_like(scales, -1.0)), INT4)
    x = RNG.standard_normal((3, INPUTS)).astype(np.float32)
    found = quantised_product(jnp.asarray(x), weight, QuantisedForm.INTEGER, "float32")
    np.testing.assert_allclose(found, x @ wide.T, rtol=0, atol=0.03)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fmt", [INT8, INT4], ids=str)
def test_a_broken_row_is_broken_and_no_other(fmt: QuantFormat, broken: float) -> None:
    weight, _ = some(fmt)
    x = RNG.standard_normal((3, INPUTS)).astype(np.float32)
    sound = np.asarray(quantised_product(jnp.asarray(x), weight, QuantisedForm.INTEGER, "float32"))
    x[1, 7] = broken
    found = np.asarray(quantised_product(jnp.asarray(x), weight, QuantisedForm.INTEGER, "float32"))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], sound[[0, 2]])


def test_zero_rows_and_zero_weights_give_zero() -> None:
    for fmt in (INT8, INT4):
        weight, _ = weight_of(quantised(np.zeros((8, 64), np.float32), fmt), fmt)
        x = jnp.ones((2, 64), jnp.float32)
        np.testing.assert_array_equal(quantised_product(x, weight, QuantisedForm.INTEGER, "float32"), 0)
        other, _ = some(fmt)
        rows = jnp.zeros((2, INPUTS), jnp.float32)
        np.testing.assert_array_equal(quantised_product(rows, other, QuantisedForm.INTEGER, "float32"), 0)


def test_column_and_row_parallel_products_take_them_alike() -> None:
    weight, wide = some(INT8)
    x = RNG.standard_normal((2, 3, INPUTS)).astype(np.float32)
    for choice in (MatmulChoice(quantised=QuantisedForm.INTEGER), MatmulChoice(many=MatmulForm.PADDED, least_rows=16)):
        for product in (column_parallel, row_parallel):
            np.testing.assert_allclose(product(jnp.asarray(x), weight, choice), x @ wide.T, rtol=0, atol=0.01)


def test_a_scaled_number_is_rounded_once_whatever_it_is_added_to() -> None:
    y, scale, other = (jnp.asarray(RNG.standard_normal(4096), jnp.float32) for _ in range(3))
    expected = np.asarray(y) * np.asarray(scale)
    np.testing.assert_array_equal(jax.jit(_scaled)(y, scale), expected)
    added = jax.jit(lambda y, scale, other: _scaled(y, scale) + other)(y, scale, other)
    np.testing.assert_array_equal(added, expected + np.asarray(other))


def test_formats_are_told_in_words() -> None:
    assert str(INT8) == "int8 by output channels"
    assert str(INT4) == "int4 by groups of 32 with minimums"
    assert dataclasses.replace(INT4, minimum=False).leaves(4, 64).keys() == {"values", "scales", "peaks"}
