"""The attention kernel for TPUs (Mosaic).

A program is one sequence of one virtual shard, with one tile of new tokens.  It copies pages of its keys and values
from the pool in HBM into a ring of buffers, several tiles ahead, and across the end of its own work into that of the
next program: copies that were waited for one by one would take longer than their bytes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged import softmax
from nitsum_jax.engine.step.paged.plan import Plan, RowLimits
from nitsum_jax.engine.step.paged.softmax import Softmax

Ref = Any  # of pallas, which has no public type for it

# Old tokens of a tile, for as much as a tile may take; and what the ring of buffers takes.
_TOKENS = 256
_TILE_BYTES = 512 * 1024
_RING_BYTES = 1024 * 1024
_MOST_BUFFERS = 8
# Queries of a program, heads and all, and what its memory may come to.
_QUERY_ELEMENTS = 512 * 256
_MEMORY_BYTES = 48 << 20
_LANES = 128
_LEAST_PAGE = 8


def limits(shape: PoolShape) -> RowLimits:
    """What a program takes at a time."""
    return RowLimits(
        least_rows=8, most_rows=min(512, _QUERY_ELEMENTS // (shape.kv_heads * shape.head_dim)), power_of_two=False
    )


def unsupported(plan: Plan) -> str | None:
    """Why there is no kernel for this, or None."""
    shape = plan.shape
    if shape.head_dim % _LANES:
        # XLA:TPU lays out such a pool with the blocks innermost, to fill its lanes, and would copy it whole.
        return f"on a TPU heads are {_LANES} wide or a multiple of it, not {shape.head_dim}"
    if shape.page_size < _LEAST_PAGE:
        return f"on a TPU pages have at least {_LEAST_PAGE} tokens, not {shape.page_size}"
    if _memory(plan) > _MEMORY_BYTES // 2:  # the other half is for what is computed
        return f"{plan.length} new tokens of {shape.kv_heads} heads do not fit the memory of a TPU's core"
    return None


def _memory(plan: Plan) -> int:
    """Bytes that a program keeps: queries and results twice, new keys and values, the ring."""
    heads = plan.shape.kv_heads * plan.shape.head_dim
    ring = 2 * max(_RING_BYTES, _tile_pages(plan) * plan.shape.block_bytes // plan.shape.layers)
    return 4 * 4 * plan.rows * heads + 2 * plan.padded_length * heads * plan.operand_dtype.itemsize + ring


def _tile_pages(plan: Plan) -> int:
    """Pages of a tile."""
    shape = plan.shape
    per_token = 2 * shape.kv_heads * shape.head_dim * shape.storage_dtype.itemsize
    tokens = _TOKENS
    while tokens > 128 and tokens * per_token > _TILE_BYTES:
        tokens //= 2
    return max(1, tokens // shape.page_size)


def _buffers(plan: Plan, pages: int) -> int:
    shape = plan.shape
    size = pages * shape.block_bytes // shape.layers
    fit = max(2, min(_MOST_BUFFERS, _RING_BYTES // size))
    return 1 << (fit.bit_length() - 1)  # a power of two, for whose remainder a program need not divide


def _view(pool: jax.Array, plan: Plan) -> jax.Array:
    """The pool as `[N, L, 2, W G/K, A]`, or `[N, L, 2, G/K, W, A]`, whichever is not a copy.

    XLA:TPU puts the tokens of a page in the place of its heads where these would not fill a tile.
    """
    shape = plan.shape
    if shape.kv_heads & (shape.kv_heads - 1) and shape.kv_heads % 8:
        return pool.transpose(0, 1, 2, 4, 3, 5)
    return pool.reshape(shape.blocks, shape.layers, 2, shape.page_size * shape.kv_heads, shape.head_dim)


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
    """`paged_attention` over arranged arrays (see `plan`).

    Args:
      q: f32[n, G/K, tiles, rows, A], n = B S.
      k: [n, G/K, T padded, A].
      v: as k.
      pool: `[N, L, 2, W, G/K, A]`.
      layer: i32[1].
      page_table: i32[n, P].
      context: i32[n].
      plan: the sizes.
      interpret: run it on a CPU.

    Returns:
      f32[n, G/K, tiles, rows, A].
    """
    programs, groups, tiles, rows, width = q.shape
    pages = _tile_pages(plan)
    buffers = _buffers(plan, pages)
    view = _view(pool, plan)
    last = programs * tiles - 1

    def whole(tokens: int) -> pl.BlockSpec:
        # One buffer where there is much: it changes with the sequence only.
        mode = pl.Buffered(1) if tokens > 1 else None
        return pl.BlockSpec((1, groups, tokens, width), lambda i, *_: (i // tiles, 0, 0, 0), pipeline_mode=mode)

    # Each row's pages, in whole tiles, and those of the row after it: a program asks for pages of both, and has one
    # place to look them up.  The same for all layers.
    missing = -page_table.shape[1] % pages
    own = jnp.pad(page_table, ((0, 0), (0, missing)))
    table = jnp.concatenate([own, jnp.roll(own, -1, axis=0)], axis=1)[:, None, :]
    table_spec = pl.BlockSpec((1, 1, table.shape[2]), lambda i, *_: (i // tiles, 0, 0), memory_space=pltpu.SMEM)
    tile_spec = pl.BlockSpec((1, groups, 1, rows, width), lambda i, *_: (i // tiles, 0, i % tiles, 0, 0))
    return pl.pallas_call(
        functools.partial(_program, plan=plan, last=last, pages=pages, buffers=buffers),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(programs * tiles,),
            in_specs=[
                table_spec,
                tile_spec,
                whole(k.shape[2]),
                whole(v.shape[2]),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=tile_spec,
            scratch_shapes=[
                pltpu.VMEM((buffers, pages, *view.shape[2:]), pool.dtype),
                pltpu.SemaphoreType.DMA((buffers,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=None
        if interpret
        else pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_MEMORY_BYTES, disable_bounds_checks=True
        ),
        interpret=interpret,
        name="paged_attention",
    )(layer, context, table, q, k, v, view)


def _program(
    layer_ref: Ref,
    context_ref: Ref,
    table_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    pool_ref: Ref,
    out_ref: Ref,
    ring: Ref,
    arrived: Ref,
    taken_ref: Ref,
    *,
    plan: Plan,
    last: int,
    pages: int,
    buffers: int,
) -> None:
    groups = plan.shape.kv_heads
    tokens = pages * plan.shape.page_size
    number = pl.program_id(0)
    tile = number % plan.tiles
    context = context_ref[number // plan.tiles]

    def extent(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first tile of old tokens of a program, and how many there are; at least one, of which nothing is seen."""
        context = context_ref[number // plan.tiles]
        first = plan.first_seen(context, number % plan.tiles) // tokens
        return first, jnp.maximum((context + jnp.int32(tokens - 1)) // tokens - first, 1)

    first, count = extent(number)
    # The next program begins with tiles that this one asks for.
    following = jnp.minimum(number + 1, last)
    next_first, next_count = extent(following)
    next_count = jnp.where(number < last, next_count, 0)
    next_page = jnp.where(tile == plan.tiles - 1, table_ref.shape[2] // 2, 0) + (next_first - count) * jnp.int32(pages)
    ahead = buffers - 1
    layer = pool_ref.at[:, layer_ref[0]]

    def buffer_of(index: jax.Array) -> jax.Array:
        """Where the tile so many after the first of this program lies; the buffers are used in turn by all programs."""
        return (taken_ref[0] + index) & jnp.int32(buffers - 1)

    def ask(index: jax.Array) -> None:
        """Asks for the tile so many after the first of this program, be it this one's or the next one's."""
        own = index < count
        start = jnp.where(own, first * jnp.int32(pages), next_page) + index * jnp.int32(pages)
        # What is there behind the last tile is looked up and not asked for, so that nothing but copies is conditional.
        start = jnp.minimum(start, table_ref.shape[2] - pages)
        # Behind the context the table holds any valid block: it is read and not seen.
        blocks = [table_ref[0, 0, start + page] for page in range(pages)]
        buffer = buffer_of(index)

        @pl.when(own | (index - count < next_count))
        def _() -> None:
            for page, block in enumerate(blocks):
                pltpu.make_async_copy(layer.at[block], ring.at[buffer, page], arrived.at[buffer]).start()

    @pl.when(number == 0)
    def _() -> None:
        taken_ref[0] = 0

    # What the program before had no room to ask for; the first one asks for everything.
    jax.lax.fori_loop(jnp.where(number == 0, 0, count), ahead, lambda index, _: ask(index), None)

    queries = [q_ref[0, group, 0] for group in range(groups)]
    states = [_new_tokens(plan, tile, q, k_ref.at[0, group], v_ref.at[0, group]) for group, q in enumerate(queries)]

    def old_tokens(index: jax.Array, states: list[Softmax]) -> list[Softmax]:
        tile_of_pool = ring.at[buffer_of(index)]
        done = arrived.at[buffer_of(index)]
        pltpu.make_async_copy(tile_of_pool, tile_of_pool, done).wait()  # for as many bytes as the copies of its pages
        start = (first + index) * tokens
        key = start + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, tokens), 1)
        seen = (key < context) & plan.sees(context + plan.offsets(tile, tokens), key)
        found = []
        for group, (q, state) in enumerate(zip(queries, states, strict=True)):
            k, v = _heads(tile_of_pool, group, plan)
            found.append(softmax.seen_keys(state, q, k, v, seen, plan.soft_cap))
        ask(index + ahead)
        return found

    states = jax.lax.fori_loop(0, count, old_tokens, states)
    taken_ref[0] = taken_ref[0] + count
    for group, state in enumerate(states):
        out_ref[0, group, 0] = softmax.result(state)


def _new_tokens(plan: Plan, tile: jax.Array, q: jax.Array, k_ref: Ref, v_ref: Ref) -> Softmax:
    """The new tokens among themselves."""
    if plan.length == 1:
        return softmax.one_key(q, k_ref[...], v_ref[...], plan.soft_cap)

    def some(index: jax.Array, state: Softmax) -> Softmax:
        at = pl.ds(index * plan.keys, plan.keys)
        key = index * plan.keys + jax.lax.broadcasted_iota(jnp.int32, (plan.rows, plan.keys), 1)
        seen = plan.sees(plan.offsets(tile, plan.keys), key)
        return softmax.seen_keys(state, q, k_ref[at], v_ref[at], seen, plan.soft_cap)

    return jax.lax.fori_loop(
        0, (tile * plan.tile) // plan.keys + 1, some, softmax.empty(plan.rows, plan.shape.head_dim)
    )


def _heads(tile: Ref, group: int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[tokens, A]` of one KV head, of a tile of pages as they lie in `_view`."""
    groups, page_size, width = plan.shape.kv_heads, plan.shape.page_size, plan.shape.head_dim
    found = []
    for which in range(2):
        part = tile.at[:, which]
        if len(part.shape) == 4:
            x = part[:, group]
        elif groups == 1:
            x = part[...]
        elif plan.operand_dtype.itemsize == 4:
            x = part[:, pl.ds(group, page_size, stride=groups)]
        else:  # two heads of a token are the halves of a word
            words = part.bitcast(jnp.uint32)[:, pl.ds(group // 2, page_size, stride=groups // 2)]
            half = words & jnp.uint32(0xFFFF0000) if group % 2 else words << 16
            x = jax.lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16)
        if x.dtype != plan.operand_dtype:
            x = pltpu.bitcast(x, plan.operand_dtype)
        found.append(x.reshape(tile.shape[0] * page_size, width))
    return found[0], found[1]
