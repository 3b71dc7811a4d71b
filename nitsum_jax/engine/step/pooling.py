"""What a step tells of its new tokens where prompts become embeddings."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nitsum_jax.models.pooling import Pooling


def pool_tokens(
    normed: Callable[[jax.Array], jax.Array], x: jax.Array, new_tokens: jax.Array, pooling: Pooling | None
) -> jax.Array:
    """One vector of a chunk: the sum of its tokens' outputs (MEAN), or the output of the last of them (LAST).

    Args:
      normed: the final norm, f32[R, D] to the same.
      x: f32[B, T, D], outputs of the last layer.
      new_tokens: i32[B], tokens that are real.
      pooling: which of both.

    Returns:
      f32[B, D]; the tokens are added in their order, whatever the layout and the compiler.
    """
    x = lax.optimization_barrier(x)  # else it might fuse with what differs between layouts

    def output(place: jax.Array) -> jax.Array:
        return normed(jnp.take_along_axis(x, place[:, None, None], axis=1)[:, 0])

    if pooling is Pooling.LAST:
        return output(jnp.maximum(new_tokens - 1, 0))

    def add(place: jax.Array, total: jax.Array) -> jax.Array:
        here = jnp.full_like(new_tokens, place)
        return total + jnp.where((here < new_tokens)[:, None], output(here), jnp.float32(0))

    return lax.fori_loop(jnp.int32(0), jnp.max(new_tokens), add, jnp.zeros((x.shape[0], x.shape[2]), jnp.float32))
