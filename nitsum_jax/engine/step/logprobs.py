"""How likely tokens were, on the device: log probabilities by the model's own distribution.

The bare logits count, before penalties, bias and temperature.  A step makes this small second output only where a row
asks for it.  The sum under the logarithm is one of integers, so its bits do not depend on how XLA orders it.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nitsum_jax.engine.request import MAX_TOP_LOGPROBS, TokenLogprob
from nitsum_jax.engine.step.attention import exp_nonpositive

# The chosen token's log probability, then those of the most likely tokens, then their ids.  Floats travel as bits.
COLUMNS = 1 + 2 * MAX_TOP_LOGPROBS

_BLOCK = 256
_LIMB = 22  # bits of a weight in one integer: a block of them fits in an i32


def token_logprobs(logits: jax.Array, sampled: jax.Array, wanted: jax.Array) -> jax.Array:
    """Log probabilities of the sampled and of the most likely tokens.

    Args:
      logits: f32[B, V], bare; padded vocabulary entries hold -inf.
      sampled: i32[B].
      wanted: bool[B]; other rows are undefined.

    Returns:
      i32[B, COLUMNS], see `read`.
    """

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        logits, sampled, wanted = row
        return lax.cond(
            wanted,
            lambda: _token_logprobs(logits[None], sampled[None])[0],
            lambda: jnp.zeros(COLUMNS, jnp.int32),
        )

    # As draws are made: on a CPU row by row, so that only rows that need it pay.
    return lax.platform_dependent(
        logits,
        sampled,
        wanted,
        cpu=lambda *rows: lax.map(one, rows),
        default=lambda logits, sampled, wanted: _token_logprobs(logits, sampled),
    )


def read(row: np.ndarray, top: int) -> TokenLogprob:
    """One row of `token_logprobs` on the host, i32[COLUMNS], with its `top` most likely tokens."""
    floats = row[: 1 + MAX_TOP_LOGPROBS].view(np.float32)
    ids = row[1 + MAX_TOP_LOGPROBS :]
    pairs = zip(ids[:top].tolist(), floats[1 : 1 + top].tolist(), strict=True)
    return TokenLogprob(float(floats[0]), tuple((token, value) for token, value in pairs if token >= 0))


def _token_logprobs(logits: jax.Array, sampled: jax.Array) -> jax.Array:
    x = jnp.minimum(jnp.where(jnp.isnan(logits), -jnp.inf, logits), jnp.finfo(jnp.float32).max)
    vocab = x.shape[1]
    best = jnp.maximum(jnp.max(x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    gap = x - best
    log_total = jnp.log(_sum_of_weights(exp_nonpositive(gap)))[:, None]
    count = min(MAX_TOP_LOGPROBS, vocab)
    nearest, ids = lax.top_k(gap, count)  # ties in order of id
    chosen = jnp.take_along_axis(gap, sampled[:, None], axis=1)
    values = jnp.concatenate([chosen, nearest], axis=1) - log_total
    missing = MAX_TOP_LOGPROBS - count
    values = jnp.pad(values, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    # Padding of the vocabulary is none of the tokens.
    ids = jnp.pad(jnp.where(nearest > -jnp.inf, ids, -1), ((0, 0), (0, missing)), constant_values=-1)
    return jnp.concatenate([lax.bitcast_convert_type(values, jnp.int32), ids.astype(jnp.int32)], axis=1)


def _sum_of_weights(weights: jax.Array) -> jax.Array:
    """`f32[B, n] -> f32[B]`, the sum of numbers from 0 to 1, each rounded to a multiple of 2**-44; n < 2**24.

    `fixed_sums.sum_of_weights` is made for a few hundred numbers: over a vocabulary it would drop the unlikely ones,
    which together may weigh much.
    """
    batch, count = weights.shape
    blocks = -(-count // _BLOCK)
    padded = jnp.pad(weights, ((0, 0), (0, blocks * _BLOCK - count))).reshape(batch, blocks, _BLOCK)
    scaled = padded * jnp.float32(1 << _LIMB)
    high = scaled.astype(jnp.int32)
    low = ((scaled - high.astype(jnp.float32)) * jnp.float32(1 << _LIMB)).astype(jnp.int32)

    def total(limbs: jax.Array) -> jax.Array:
        sums = jnp.sum(limbs, axis=-1)  # below 2**30 each
        upper = jnp.sum(sums >> 15, axis=-1).astype(jnp.float32)
        return upper * jnp.float32(1 << 15) + jnp.sum(sums & 0x7FFF, axis=-1).astype(jnp.float32)

    unit = jnp.float32(2.0**-_LIMB)
    return (total(high) + total(low) * unit) * unit
