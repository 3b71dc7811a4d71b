"""Root-mean-square norms: over an axis that lies on one device, and over heads that lie on several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.fixed_sums import sum_of_squares
from nitsum_jax.models.layers.reduction import Ranks


# Traced once for all layers; XLA makes one program of it all the same.
@functools.partial(jax.jit, static_argnames=("eps", "offset"))
def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32, times scale and offset together."""
    width = x.shape[-1]
    # sqrt(D) / sqrt(sum + D eps) rather than 1 / sqrt(sum / D + eps): no product that is added to something.
    inverse = jax.lax.rsqrt(sum_of_squares(x)[..., None] + jnp.float32(width * eps)) * jnp.float32(width**0.5)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    if offset:
        scale = scale + jnp.float32(offset)
    return x * inverse * scale


def wide_norms(
    q: jax.Array, k: jax.Array, q_scale: jax.Array, k_scale: jax.Array, cut: ModelCut, ranks: Ranks
) -> tuple[jax.Array, jax.Array]:
    """Norms of q and k, each over all its heads together.

    Heads lie on several devices.  Each virtual shard sums up its own squares, and these sums are added as partial
    results are: in one order at every TP.

    Args:
      q: f32[B, T, S, H/K, A].
      k: f32[B, T, S, G/K, A].
      q_scale: f32[S, H/K A], 0 where heads are padding.
      k_scale: f32[S, G/K A].
      cut: of the model.
      ranks: the devices of the step.
    """
    config, slots = cut.config, q.shape[2]
    first = jax.lax.dynamic_slice_in_dim(jnp.asarray(_first_copies(cut)), ranks.index() * jnp.int32(slots), slots)
    once = k * first[None, None, :, :, None]  # a KV head that several virtual shards have counts once
    squares = jnp.stack([sum_of_squares(x.reshape(*x.shape[:3], -1)) for x in (q, once)], axis=-1)
    totals = ranks.exactly.sum([squares[:, :, slot] for slot in range(slots)])
    return (
        _scaled(q, totals[..., 0], q_scale, config.num_heads * config.head_dim, config.norm_eps),
        _scaled(k, totals[..., 1], k_scale, config.num_kv_heads * config.head_dim, config.norm_eps),
    )


def _scaled(x: jax.Array, total: jax.Array, scale: jax.Array, width: int, eps: float) -> jax.Array:
    inverse = jax.lax.rsqrt(total + jnp.float32(width * eps)) * jnp.float32(width**0.5)
    return x * inverse[:, :, None, None, None] * scale.reshape(1, 1, *x.shape[2:])


@functools.cache
def _first_copies(cut: ModelCut) -> np.ndarray:
    """f32[K, G/K]: 1 where a vshard is the first that has a KV head."""
    seen: set[int | None] = {None}
    found = np.zeros((cut.num_vshards, cut.kv_heads), np.float32)
    for vshard, heads in enumerate(cut.kv_head_of):
        for slot, head in enumerate(heads):
            if head not in seen:
                seen.add(head)
                found[vshard, slot] = 1
    return found
