"""The attention kernels for GPUs (Triton).

A program is one KV head of one sequence and virtual shard.  Of a prefill step it has one tile of new tokens, which
attend to each other and to all old ones.

A decode step has few programs of that kind, fewer than a GPU has multiprocessors.  So each has a part of the old tokens
only, and a second kernel adds the parts up in order, beginning with the new token.  How long a part is depends on the
size of the block table alone: neither other rows nor the layout change what is added in which order.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged import softmax
from nitsum_jax.engine.step.paged.plan import Plan, RowLimits
from nitsum_jax.engine.step.paged.softmax import Softmax
from nitsum_jax.engine.step.paged.triton_pool import Ref, fitting, lanes, old_tokens, tile_tokens, tiles_of
from nitsum_jax.meshes.workspace import LEAST_GPU_ROWS, MOST_PARTS

_QUERY_BYTES = 16 * 1024  # of a program: as much as its registers hold beside the result
_MOST_WIDTH = 256
_MOST_HEADS = 64
_LEAST_PART = 512  # old tokens of a part of a decode step
_COMPILER = plgpu.CompilerParams(num_warps=4, num_stages=3)


def limits(shape: PoolShape) -> RowLimits:
    """What a program takes at a time."""
    return RowLimits(least_rows=LEAST_GPU_ROWS, most_rows=fitting(_QUERY_BYTES, shape), power_of_two=True)


def unsupported(plan: Plan) -> str | None:
    """Why there is no kernel for this, or None."""
    shape = plan.shape
    if shape.head_dim > _MOST_WIDTH:
        return f"on a GPU heads are at most {_MOST_WIDTH} wide, not {shape.head_dim}"
    if plan.heads > _MOST_HEADS:
        return f"on a GPU a KV head has at most {_MOST_HEADS} query heads, not {plan.per_group}"
    return None


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
    width, padded = shape.head_dim, lanes(shape)
    if padded != width:
        q, k, v = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded - width)]) for x in (q, k, v))
    view = pool.reshape(shape.blocks * shape.layers * 2 * shape.page_size * shape.kv_heads, width)

    attend_to = _decode if plan.length == 1 else _prefill
    return attend_to(q, k, v, (layer, context, page_table, view), plan, interpret)[..., :width]


def _prefill(
    q: jax.Array, k: jax.Array, v: jax.Array, old: tuple[jax.Array, ...], plan: Plan, interpret: bool
) -> jax.Array:
    programs, groups, tiles, rows, width = q.shape
    tile_spec = pl.BlockSpec((None, None, None, rows, width), lambda n, group, tile: (n, group, tile, 0, 0))
    new_spec = pl.BlockSpec((None, None, *k.shape[2:]), lambda n, group, tile: (n, group, 0, 0))
    out: jax.Array = pl.pallas_call(
        functools.partial(_chunk, plan=plan),
        grid=(programs, groups, tiles),
        in_specs=[*map(_whole, old), tile_spec, new_spec, new_spec],
        out_specs=tile_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=None if interpret else _COMPILER,
        interpret=interpret,
        name="paged_attention",
    )(*old, q, k, v)
    return out


def _decode(
    q: jax.Array, k: jax.Array, v: jax.Array, old: tuple[jax.Array, ...], plan: Plan, interpret: bool
) -> jax.Array:
    programs, groups, _, rows, width = q.shape
    tiles = -(-old[2].shape[1] * plan.shape.page_size // tile_tokens(plan.shape))
    per_part = max(_LEAST_PART // tile_tokens(plan.shape), -(-tiles // MOST_PARTS))
    parts = -(-tiles // per_part)

    def of_part(last: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, rows, last), lambda n, group, part: (n, group, part, 0, 0))

    def of_head(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda n, group, *_: (n, group, *[0] * (x.ndim - 2)))

    def array(last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((programs, groups, parts, rows, last), jnp.float32)

    found = pl.pallas_call(
        functools.partial(_part, plan=plan, per_part=per_part),
        grid=(programs, groups, parts),
        in_specs=[*map(_whole, old), of_head(q)],
        out_specs=[of_part(1), of_part(1), of_part(width)],
        out_shape=[array(1), array(1), array(width)],
        compiler_params=None if interpret else _COMPILER,
        interpret=interpret,
        name="paged_attention",
    )(*old, q)
    out: jax.Array = pl.pallas_call(
        functools.partial(_sum_of_parts, plan=plan, per_part=per_part),
        grid=(programs, groups),
        in_specs=[_whole(old[1]), of_head(q), of_head(k), of_head(v), *map(of_head, found)],
        out_specs=of_head(q),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=None if interpret else _COMPILER,
        interpret=interpret,
        name="paged_attention_sum",
    )(old[1], q, k, v, *found)
    return out


def _whole(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)


def _parts_of(context: jax.Array, plan: Plan, per_part: int) -> tuple[jax.Array, jax.Array]:
    """The first part of the old tokens that has some that are seen, and the one behind the last."""
    first, end = tiles_of(context, 0, plan)
    return first // per_part, jnp.where(first < end, (end + jnp.int32(per_part - 1)) // per_part, first // per_part)


def _part(
    layer_ref: Ref,
    context_ref: Ref,
    table_ref: Ref,
    pool_ref: Ref,
    q_ref: Ref,
    top_ref: Ref,
    total_ref: Ref,
    out_ref: Ref,
    *,
    plan: Plan,
    per_part: int,
) -> None:
    n, group, part = (pl.program_id(axis) for axis in range(3))
    first, end = tiles_of(context_ref[n], 0, plan)
    first, end = jnp.maximum(first, part * per_part), jnp.minimum(end, (part + 1) * per_part)

    @pl.when(first < end)  # else nobody reads the results
    def _() -> None:
        q = q_ref[0]
        state = softmax.empty(*q.shape)
        state = old_tokens(plan, layer_ref, context_ref, table_ref, pool_ref, q, (n, group, 0), (first, end), state)
        top_ref[...], total_ref[...], out_ref[...] = state


def _sum_of_parts(
    context_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    top_ref: Ref,
    total_ref: Ref,
    out_ref: Ref,
    result_ref: Ref,
    *,
    plan: Plan,
    per_part: int,
) -> None:
    def add(part: jax.Array, state: Softmax) -> Softmax:
        return softmax.joined(state, Softmax(top_ref[part], total_ref[part], out_ref[part]))

    state = softmax.one_key(q_ref[0], k_ref[...], v_ref[...], plan.soft_cap)
    state = jax.lax.fori_loop(*_parts_of(context_ref[pl.program_id(0)], plan, per_part), add, state)
    result_ref[0] = softmax.result(state)


def _chunk(
    layer_ref: Ref,
    context_ref: Ref,
    table_ref: Ref,
    pool_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    out_ref: Ref,
    *,
    plan: Plan,
) -> None:
    n, group, tile = (pl.program_id(axis) for axis in range(3))
    q = q_ref[...]
    state = _new_tokens(plan, tile, q, k_ref, v_ref)
    extent = tiles_of(context_ref[n], tile, plan)
    state = old_tokens(plan, layer_ref, context_ref, table_ref, pool_ref, q, (n, group, tile), extent, state)
    out_ref[...] = softmax.result(state)


def _new_tokens(plan: Plan, tile: jax.Array, q: jax.Array, k_ref: Ref, v_ref: Ref) -> Softmax:
    """The new tokens among themselves."""

    def some(index: jax.Array, state: Softmax) -> Softmax:
        at = pl.ds(index * plan.keys, plan.keys)
        key = index * plan.keys + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.keys), 1)
        seen = plan.sees(plan.offsets(tile, plan.keys), key)
        return softmax.seen_keys(state, q, k_ref[at, :], v_ref[at, :], seen, plan.soft_cap)

    return jax.lax.fori_loop(0, (tile * plan.tile) // plan.keys + 1, some, softmax.empty(plan.rows, q.shape[1]))
