"""Every form of a matrix product gives the product; they differ in speed and in the last bits only."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.models.layers.matmul import MatmulChoice, MatmulForm, column_parallel, row_parallel

ROWS = (1, 2, 5)
FORMS = tuple(MatmulForm)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_float32(form: MatmulForm, rows: int) -> None:
    choice = MatmulChoice(form, form)
    weight = normal(24, 40)
    x, y = normal(1, rows, 40), normal(1, rows, 24)
    for actual, expected in (
        (column_parallel(jnp.asarray(x), jnp.asarray(weight), choice), x.astype(np.float64) @ weight.T),
        (row_parallel(jnp.asarray(y), jnp.asarray(weight), choice), y.astype(np.float64) @ weight),
    ):
        assert actual.dtype == jnp.float32
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_weights_give_float32_sums(form: MatmulForm, rows: int) -> None:
    choice = MatmulChoice(form, form)
    weight = normal(24, 64).astype(ml_dtypes.bfloat16)
    x = normal(rows, 64)
    actual = column_parallel(jnp.asarray(x), jnp.asarray(weight), choice)
    assert actual.dtype == jnp.float32
    # Dots take their rows in the weight's type; the loop keeps them as they are.
    taken = x if form is MatmulForm.MULTIPLY_SUM else x.astype(ml_dtypes.bfloat16)
    expected = taken.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_one_row_and_many_rows_may_take_different_forms() -> None:
    choice = MatmulChoice(single=MatmulForm.MULTIPLY_SUM, many=MatmulForm.PADDED)
    assert [choice.form(rows) for rows in (1, 2, 64)] == [
        MatmulForm.MULTIPLY_SUM,
        MatmulForm.PADDED,
        MatmulForm.PADDED,
    ]
    weight = jnp.asarray(normal(8, 16).astype(ml_dtypes.bfloat16))
    row = jnp.asarray(normal(1, 1, 16))  # one row, whatever the leading axes
    expected = column_parallel(row, weight, MatmulChoice(MatmulForm.MULTIPLY_SUM, MatmulForm.MULTIPLY_SUM))
    np.testing.assert_array_equal(column_parallel(row, weight, choice), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_few_rows_are_padded_to_as_many_as_the_platform_multiplies_at_once(rows: int) -> None:
    choice = step_forms("tpu", "bfloat16").matmul
    weight, x = jnp.asarray(normal(24, 40).astype(ml_dtypes.bfloat16)), jnp.asarray(normal(rows, 40))
    text = jax.jit(lambda x, w: column_parallel(x, w, choice)).lower(x, weight).as_text()
    assert "tensor<8x40xbf16>, tensor<24x40xbf16>" in text
    expected = column_parallel(x, weight, MatmulChoice())
    np.testing.assert_allclose(column_parallel(x, weight, choice), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
# MULTIPLY_SUM is for a single row: with more, XLA splits its loop by how much else the program does.
@pytest.mark.parametrize(
    ("form", "rows"),
    [
        (MatmulForm.DOT, 1),
        (MatmulForm.DOT, 8),
        (MatmulForm.PADDED, 1),
        (MatmulForm.PADDED, 8),
        (MatmulForm.MULTIPLY_SUM, 1),
    ],
)
def test_a_vshard_gives_the_same_bits_alone_and_in_company(form: MatmulForm, rows: int, dtype: str) -> None:
    choice = MatmulChoice(form, form)
    weights = [jnp.asarray(normal(32, 96) * np.float32(i + 1)).astype(dtype) for i in range(4)]
    x = jnp.asarray(normal(rows, 96))
    together = jax.jit(lambda x, ws: [column_parallel(x, w, choice) for w in ws])(x, weights)
    alone = jax.jit(lambda x, w: column_parallel(x, w, choice))
    for weight, expected in zip(weights, together, strict=True):
        np.testing.assert_array_equal(alone(x, weight), expected)
