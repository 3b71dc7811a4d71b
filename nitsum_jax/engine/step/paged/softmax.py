"""The online softmax of one program of a kernel: the same few lines in Mosaic, Triton and interpret mode.

A program holds one set of rows (query heads of one KV head, times new tokens) and takes keys in tiles of a fixed size,
one after the other.  Every result of a row is hence a sum in one order, given by the row's own past alone.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# The running maximum before any key: finite, so that a tile of which a row sees nothing leaves it as it is.
_LOWEST = -1e30


class Softmax(NamedTuple):
    """What a row has seen so far.

    Attributes:
      top: f32[rows, 1], the largest score.
      total: f32[rows, 1], the sum of the weights e**(score - top).
      out: f32[rows, A], the sum of the values times their weights.
    """

    top: jax.Array
    total: jax.Array
    out: jax.Array


def empty(rows: int, width: int) -> Softmax:
    """Rows that have seen nothing."""
    one = jnp.zeros((rows, 1), jnp.float32)
    return Softmax(one + jnp.float32(_LOWEST), one, jnp.zeros((rows, width), jnp.float32))


def one_key(q: jax.Array, k: jax.Array, v: jax.Array, soft_cap: float | None) -> Softmax:
    """Rows `f32[rows, A]` that have seen one token, `f32[1, A]`, which every row sees."""
    top = capped(jnp.sum(q * k, axis=1, keepdims=True), soft_cap)
    total = jnp.where(top != top, top, jnp.float32(1))  # NaN stays NaN
    return Softmax(top, total, jnp.broadcast_to(v, q.shape))


def seen_keys(
    state: Softmax, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, soft_cap: float | None
) -> Softmax:
    """Takes a tile of keys and values `[tokens, A]`, of which rows see what `seen` bool[rows, tokens] says.

    The products take their operands in the type of keys and values and add up in float32.
    """
    scores = capped(_dot(q.astype(k.dtype), k, contract=1), soft_cap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jnp.maximum(state.top, jnp.max(scores, axis=1, keepdims=True))
    shrink = jnp.exp(state.top - top)
    weights = jnp.exp(scores - top)
    total = state.total * shrink + jnp.sum(weights, axis=1, keepdims=True)
    return Softmax(top, total, state.out * shrink + _dot(weights.astype(v.dtype), v, contract=0))


def joined(first: Softmax, second: Softmax) -> Softmax:
    """Rows that have seen what `first` and then `second` have."""
    top = jnp.maximum(first.top, second.top)
    one, other = jnp.exp(first.top - top), jnp.exp(second.top - top)
    return Softmax(top, first.total * one + second.total * other, first.out * one + second.out * other)


def result(state: Softmax) -> jax.Array:
    """f32[rows, A]."""
    return state.out / state.total


def capped(scores: jax.Array, soft_cap: float | None) -> jax.Array:
    """Scores bent to lie between plus and minus `soft_cap`."""
    if soft_cap is None:
        return scores
    return jnp.float32(soft_cap) * jnp.tanh(scores * jnp.float32(1 / soft_cap))


def _dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((1,), (contract,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
