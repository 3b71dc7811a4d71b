"""The attention kernel for GPUs (Triton).

A program is one KV head of one sequence, with one tile of new tokens.  It reads keys and values where they lie in the
pool, each row of a page by its own address, and nothing behind the context.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged import softmax
from nitsum_jax.engine.step.paged.plan import Limits, Plan
from nitsum_jax.engine.step.paged.softmax import Softmax

Ref = Any  # of pallas, which has no public type for it

# What a program takes of queries, keys or values at a time, bytes: as much as its registers and shared memory hold.
_QUERY_BYTES = 16 * 1024
_KEY_BYTES = 32 * 1024
_MOST_WIDTH = 256
_MOST_HEADS = 64


def limits(shape: PoolShape) -> Limits:
    """What a program takes at a time."""
    return Limits(least_rows=16, most_rows=_fitting(_QUERY_BYTES, shape), power_of_two=True)


def unsupported(plan: Plan) -> str | None:
    """Why there is no kernel for this, or None."""
    shape = plan.shape
    if shape.head_dim > _MOST_WIDTH:
        return f"on a GPU heads are at most {_MOST_WIDTH} wide, not {shape.head_dim}"
    if plan.heads > _MOST_HEADS:
        return f"on a GPU a KV head has at most {_MOST_HEADS} query heads, not {plan.per_group}"
    return None


def _fitting(size: int, shape: PoolShape) -> int:
    lanes = 1 << (shape.head_dim - 1).bit_length()
    return max(16, min(64, size // (lanes * jnp.dtype(shape.dtype).itemsize)))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    context: jax.Array,
    plan: Plan,
    *,
    interpret: bool,
) -> jax.Array:
    """As `mosaic.attend`."""
    shape = plan.shape
    programs, groups, tiles, rows, width = q.shape
    lanes = 1 << (width - 1).bit_length()
    if lanes != width:  # a tile's sides are powers of two
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, lanes - width)]) for x in (q, k, v))
    view = pool.reshape(shape.blocks * shape.layers * 2 * shape.page_size * groups, width)

    def all_of(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda n, group, tile: (0,) * x.ndim)

    def new(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, group, tile: (n, group, 0, 0))

    tile_spec = pl.BlockSpec((None, None, None, rows, lanes), lambda n, group, tile: (n, group, tile, 0, 0))
    out = pl.pallas_call(
        functools.partial(_program, plan=plan),
        grid=(programs, groups, tiles),
        in_specs=[all_of(layer), all_of(context), all_of(page_table), tile_spec, new(k), new(v), all_of(view)],
        out_specs=tile_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="paged_attention",
    )(layer, context, page_table, q, k, v, view)
    return out[..., :width]


def _program(
    layer_ref: Ref,
    context_ref: Ref,
    table_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    pool_ref: Ref,
    out_ref: Ref,
    *,
    plan: Plan,
) -> None:
    shape = plan.shape
    n, group, tile = (pl.program_id(axis) for axis in range(3))
    context, layer = context_ref[n], layer_ref[0]
    q = q_ref[...]
    lane = jnp.arange(q.shape[1], dtype=jnp.int32)
    tokens = _fitting(_KEY_BYTES, shape)

    def old_tokens(index: jax.Array, state: Softmax) -> Softmax:
        token = index * tokens + jnp.arange(tokens, dtype=jnp.int32)
        inside = token < context
        page = token // shape.page_size
        block = plgpu.load(table_ref.at[n, page], mask=inside, other=0)
        row = (block * (2 * shape.layers) + 2 * layer) * shape.page_size + token % shape.page_size
        row = row * shape.kv_heads + group
        k = _load(pool_ref, row, lane, inside, plan)
        v = _load(pool_ref, row + shape.page_size * shape.kv_heads, lane, inside, plan)
        key = index * tokens + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, tokens), 1)
        seen = (key < context) & plan.sees(context + plan.offsets(tile, tokens), key)
        return softmax.seen_keys(state, q, k, v, seen, plan.soft_cap)

    state = _new_tokens(plan, tile, q, k_ref, v_ref)
    first = plan.first_seen(context, tile) // tokens
    state = jax.lax.fori_loop(first, (context + tokens - 1) // tokens, old_tokens, state)
    out_ref[...] = softmax.result(state)


def _new_tokens(plan: Plan, tile: jax.Array, q: jax.Array, k_ref: Ref, v_ref: Ref) -> Softmax:
    """The new tokens among themselves."""
    if plan.length == 1:
        return softmax.one_key(q, k_ref[...], v_ref[...], plan.soft_cap)

    def some(index: jax.Array, state: Softmax) -> Softmax:
        at = pl.ds(index * plan.keys, plan.keys)
        key = index * plan.keys + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.keys), 1)
        seen = plan.sees(plan.offsets(tile, plan.keys), key)
        return softmax.seen_keys(state, q, k_ref[at, :], v_ref[at, :], seen, plan.soft_cap)

    return jax.lax.fori_loop(0, (tile * plan.tile) // plan.keys + 1, some, softmax.empty(plan.rows, q.shape[1]))


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
