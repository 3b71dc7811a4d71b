"""How the kernels for GPUs read the pool: each row of a page by its own address, and nothing behind the context."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged import softmax
from nitsum_jax.engine.step.paged.plan import Plan
from nitsum_jax.engine.step.paged.softmax import Softmax

Ref = Any  # of pallas, which has no public type for it

_KEY_BYTES = 32 * 1024  # of keys that a program takes at a time: as much as its shared memory holds several times


def fitting(size: int, shape: PoolShape) -> int:
    """Rows of a head's width that so many bytes hold, within what a product takes well."""
    return max(16, min(64, size // (lanes(shape) * jnp.dtype(shape.dtype).itemsize)))


def lanes(shape: PoolShape) -> int:
    """A, padded: the sides of what a program holds are powers of two."""
    return 1 << (shape.head_dim - 1).bit_length()


def tile_tokens(shape: PoolShape) -> int:
    """Old tokens of a tile."""
    return fitting(_KEY_BYTES, shape)


def tiles_of(context: jax.Array, tile: jax.Array | int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """The first tile of old tokens that a tile of new ones sees, and the one behind the last."""
    tokens = tile_tokens(plan.shape)
    first = plan.first_seen(context, jnp.int32(tile)) // tokens
    return first, (context + jnp.int32(tokens - 1)) // tokens


def old_tokens(
    plan: Plan,
    layer_ref: Ref,
    context_ref: Ref,
    table_ref: Ref,
    pool_ref: Ref,
    q: jax.Array,
    place: tuple[jax.Array, jax.Array, jax.Array | int],
    extent: tuple[jax.Array, jax.Array],
    state: Softmax,
) -> Softmax:
    """Takes some tiles of old tokens.

    Args:
      plan: the sizes.
      layer_ref: i32[1].
      context_ref: i32[n].
      table_ref: i32[n, P].
      pool_ref: `[N L 2 W G/K, A]`.
      q: f32[rows, A padded].
      place: the sequence and virtual shard, its KV head, and the tile of new tokens.
      extent: the first tile of old tokens, and the one behind the last.
      state: what the rows have seen.
    """
    shape = plan.shape
    n, group, tile = place
    context, layer = context_ref[n], layer_ref[0]
    lane = jnp.arange(q.shape[1], dtype=jnp.int32)
    tokens = tile_tokens(shape)

    def take(index: jax.Array, state: Softmax) -> Softmax:
        token = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        inside = token < context
        block = plgpu.load(table_ref.at[n, token // shape.page_size], mask=inside, other=0)
        row = (block * (2 * shape.layers) + 2 * layer) * shape.page_size + token % shape.page_size
        row = row * shape.kv_heads + group
        k = _load(pool_ref, row, lane, inside, plan)
        v = _load(pool_ref, row + shape.page_size * shape.kv_heads, lane, inside, plan)
        key = index * tokens + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, tokens), 1)
        seen = (key < context) & plan.sees(context + plan.offsets(jnp.int32(tile), tokens), key)
        return softmax.seen_keys(state, q, k, v, seen, plan.soft_cap)

    found: Softmax = jax.lax.fori_loop(*extent, take, state)
    return found


def _load(pool_ref: Ref, row: jax.Array, lane: jax.Array, inside: jax.Array, plan: Plan) -> jax.Array:
    """Rows of the pool, `[tokens, A padded]` in the type of the products; 0 outside."""
    width = plan.shape.head_dim
    mask = jnp.broadcast_to(inside[:, None], (row.shape[0], lane.shape[0]))
    if lane.shape[0] != width:
        mask = mask & (lane < width)[None, :]
    stored = plgpu.load(pool_ref.at[row[:, None], lane[None, :]], mask=mask, other=0)
    if stored.dtype != plan.operand_dtype:
        stored = jax.lax.bitcast_convert_type(stored, plan.operand_dtype)
    return stored
