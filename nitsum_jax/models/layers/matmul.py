"""Forms of the matrix products of a decoder.

The same product can be written in several ways, and on a CPU the best is up to 20 times faster than the worst,
depending on the number of rows and the data type.  Every weight is stored with its tensor-parallel axis first: `[N, D]`
for both kinds of product.

  column parallel: `x[R, D] -> y[R, N]`, contracting the weight's axis 1
  row parallel:    `x[R, N] -> y[R, D]`, contracting the weight's axis 0

Quantised weights are `[outputs, inputs]` for both (see `quantised`).

All forms take float32 rows, return float32, and (for one form) give the same bits for a weight whether it is used
alone or beside others, which is what makes a virtual shard's partial result independent of the layout.
"""

import dataclasses
import enum

import jax
import jax.numpy as jnp

from nitsum_jax.models.layers.quantised import QuantisedForm, QuantisedWeight, quantised_product


class MatmulForm(enum.StrEnum):
    """How a product with a `[N, D]` weight is written.

    DOT: one dot in the weight's own type with a float32 result.  Best for many rows, and on accelerators always.
    PADDED: as DOT, with at least `least_rows` rows; XLA:CPU has no fast bfloat16 product of a matrix and a single
      vector, and a TPU multiplies few rows on its vector unit.
    MULTIPLY_SUM: widen, multiply and add up; one fused loop over the weight, no call into a matmul library.
    """

    DOT = "dot"
    PADDED = "padded"
    MULTIPLY_SUM = "multiply_sum"


@dataclasses.dataclass(frozen=True)
class MatmulChoice:
    """Which form serves how many rows.

    Attributes:
      single: for one row.
      many: for more.
      least_rows: of the form PADDED.
      quantised: of quantised weights, for any number of rows.
      widened: type to which quantised weights are widened, where their form does.
    """

    single: MatmulForm = MatmulForm.DOT
    many: MatmulForm = MatmulForm.DOT
    least_rows: int = 2
    quantised: QuantisedForm = QuantisedForm.WIDENED
    widened: str = "float32"

    def form(self, rows: int) -> MatmulForm:
        """The form for a product of `rows` rows."""
        return self.single if rows == 1 else self.many


def column_parallel(x: jax.Array, weight: jax.Array | QuantisedWeight, choice: MatmulChoice) -> jax.Array:
    """`x[..., D] @ weight[N, D].T -> f32[..., N]`."""
    return _product(x, weight, 1, choice)


def row_parallel(x: jax.Array, weight: jax.Array | QuantisedWeight, choice: MatmulChoice) -> jax.Array:
    """`x[..., N] @ weight[N, D] -> f32[..., D]`: one virtual shard's part of a sum over all of them."""
    return _product(x, weight, 0, choice)


def embedding_rows(table: jax.Array | QuantisedWeight, index: jax.Array) -> jax.Array:
    """`table[V, D], i32[...] -> f32[..., D]`; every index is in bounds."""
    if isinstance(table, QuantisedWeight):
        return table.rows(index)
    return table.at[index].get(mode="promise_in_bounds").astype(jnp.float32)


def _product(x: jax.Array, weight: jax.Array | QuantisedWeight, contract: int, choice: MatmulChoice) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(weight, QuantisedWeight):
        least = choice.least_rows if choice.form(len(rows)) is MatmulForm.PADDED else 1
        y = quantised_product(rows, weight, choice.quantised, choice.widened, least)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    match choice.form(rows.shape[0]):
        case MatmulForm.DOT:
            y = _dot(rows, weight, contract)
        case MatmulForm.PADDED:
            missing = max(0, choice.least_rows - rows.shape[0])
            y = _dot(jnp.pad(rows, ((0, missing), (0, 0))), weight, contract)[: rows.shape[0]]
        case MatmulForm.MULTIPLY_SUM:
            wide = weight.astype(jnp.float32)
            if contract == 1:
                y = jnp.sum(rows[:, None, :] * wide[None, :, :], axis=-1)
            else:
                y = jnp.sum(rows[:, :, None] * wide[None, :, :], axis=1)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _dot(rows: jax.Array, weight: jax.Array, contract: int) -> jax.Array:
    # Precision is stated because on GPU and TPU a float32 dot may otherwise be rounded to fewer bits.
    return jax.lax.dot_general(
        rows.astype(weight.dtype),
        weight,
        (((1,), (contract,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
