"""Attention of new tokens over a paged KV pool.

A block is `page_size` tokens of one virtual shard's KV heads with all layers: the pool of a device is
`[blocks, L, 2, W, G/K, A]`.  Keys and values of the tokens of the present step are not in the pool yet: they are attended to
directly and written in one go at the end of the step, so that within a step the pool is only read, then written in place.

Old tokens are taken in chunks of a fixed number of pages with a running maximum and sum (online softmax, arXiv 1805.02867).  A chunk that
lies wholly behind a row's context leaves that row's result untouched to the bit.  Hence a row's result depends on its own context alone,
not on the longest context of the batch, and one executable serves all context lengths.
"""

import dataclasses

import jax
import jax.numpy as jnp

CHUNK_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """Shape of one device's pool.

    Attributes:
      blocks: N, number of blocks.
      layers: L.
      page_size: W, tokens per block.
      kv_heads: G/K, KV heads of one virtual shard.
      head_dim: A.
      dtype: float32 or bfloat16.  bfloat16 lies in the pool as uint16: XLA:CPU widens whole bfloat16 operands of a scatter
        to float32, which would copy the pool; integers it leaves alone.
    """

    blocks: int
    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The type in which the pool is stored."""
        return jnp.dtype(jnp.uint16 if self.dtype == "bfloat16" else jnp.float32)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block, `[L, 2, W, G/K, A]`."""
        return (self.layers, 2, self.page_size, self.kv_heads, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        size = self.storage_dtype.itemsize
        for n in self.block_shape:
            size *= n
        return size

    @property
    def chunk_pages(self) -> int:
        """Pages that attention takes at a time."""
        return max(1, CHUNK_TOKENS // self.page_size)

    def pages(self, tokens: int) -> int:
        """Pages of a block table that holds `tokens` tokens, rounded up to whole chunks."""
        chunk = self.chunk_pages * self.page_size
        return -(-tokens // chunk) * self.chunk_pages


def encode(values: jax.Array, shape: PoolShape) -> jax.Array:
    """float32 -> the pool's storage type."""
    if shape.dtype == "bfloat16":
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values


def decode(stored: jax.Array, shape: PoolShape) -> jax.Array:
    """The pool's storage type -> float32."""
    if shape.dtype == "bfloat16":
        # A shift, not a bfloat16 conversion: XLA:CPU vectorises it.
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
    return stored


# Largest score so far f32[B, G/K, rows], sum of weights f32[B, G/K, rows], weighted sum of values f32[B, G/K, rows, A].
_Running = tuple[jax.Array, jax.Array, jax.Array]


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: int,
    table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
) -> jax.Array:
    """Attends T new tokens per row to the row's context in the pool and, causally, to themselves.

    Args:
      q: f32[B, T, S, H/K, A], one device's S virtual shards.
      k: f32[B, T, S, G/K, A] of the new tokens.
      v: as k.
      pool: `[N, L, 2, W, G/K, A]` in storage type.
      layer: which layer of the pool.
      table: i32[B, S, P], blocks of each row and shard in order.
      context: i32[B], tokens in the pool per row.
      shape: the pool's shape.

    Returns:
      f32[B, T, S, H/K, A].
    """
    batch, length, slots, heads, width = q.shape
    groups = k.shape[3]
    per_group = heads // groups
    rows = per_group * length
    seen = jnp.tile(jnp.tri(length, dtype=bool), (per_group, 1))[None, None]
    chunk = shape.chunk_pages
    tokens = chunk * shape.page_size
    flat = pool.reshape(shape.blocks * shape.layers * 2, shape.page_size, groups, width)

    # Each virtual shard is computed by operations of its own, whose shapes do not depend on how many lie on this device: XLA
    # writes a product with a batch axis of one differently from one of four, and rounds it differently.
    def split(slot: int) -> jax.Array:
        """Rows of the products, f32[B, G, R*T, A]: the query heads of a group and the new tokens together."""
        x = q[:, :, slot].reshape(batch, length, groups, per_group, width) * jnp.float32(width**-0.5)
        return x.transpose(0, 2, 3, 1, 4).reshape(batch, groups, rows, width)

    def start(slot: int) -> _Running:
        """The new tokens among themselves: the running maximum starts finite, because every token sees itself."""
        scores = jnp.einsum("bgra,buga->bgru", queries[slot], k[:, :, slot])
        if length > 1:
            scores = jnp.where(seen, scores, -jnp.inf)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        return top, jnp.sum(weights, axis=-1), jnp.einsum("bgru,buga->bgra", weights, v[:, :, slot])

    def fetch(pages: jax.Array, which: int) -> jax.Array:
        index = pages * jnp.int32(shape.layers * 2) + jnp.int32(layer * 2 + which)
        stored = flat.at[index].get(mode="promise_in_bounds")
        return decode(stored, shape).reshape(batch, tokens, groups, width)

    def chunk_step(index: jax.Array, carry: list[_Running]) -> list[_Running]:
        position = index * jnp.int32(tokens) + jnp.arange(tokens, dtype=jnp.int32)
        old = (position[None, :] < context[:, None])[:, None, None, :]
        result = []
        for slot, (top, total, out) in enumerate(carry):
            pages = jax.lax.dynamic_slice_in_dim(table[:, slot], index * chunk, chunk, axis=1)
            scores = jnp.einsum("bgra,btga->bgrt", queries[slot], fetch(pages, 0))
            scores = jnp.where(old, scores, -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            shrink = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top[..., None])
            total = total * shrink + jnp.sum(weights, axis=-1)
            out = out * shrink[..., None] + jnp.einsum("bgrt,btga->bgra", weights, fetch(pages, 1))
            result.append((new_top, total, out))
        return result

    queries = [split(slot) for slot in range(slots)]
    chunks = (jnp.max(context) + jnp.int32(tokens - 1)) // jnp.int32(tokens)
    running = jax.lax.fori_loop(jnp.int32(0), chunks, chunk_step, [start(slot) for slot in range(slots)])
    results = []
    for _, total, out in running:
        x = (out / total[..., None]).reshape(batch, groups, per_group, length, width)
        results.append(x.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width))
    return jnp.stack(results, axis=2)


def write_tokens(
    pool: jax.Array, new: jax.Array, table: jax.Array, context: jax.Array, counts: jax.Array, shape: PoolShape
) -> jax.Array:
    """Writes the keys and values of a step's tokens, all layers at once.

    Args:
      pool: `[N, L, 2, W, G/K, A]` in storage type; donated by the caller, updated in place.
      new: f32[B, T, S, L, 2, G/K, A].
      table: i32[B, S, P].
      context: i32[B], position of each row's first new token.
      counts: i32[B], how many of the T tokens are real; the rest is not written.
      shape: the pool's shape.

    Returns:
      The pool.
    """
    batch, length, slots = new.shape[:3]
    step = jnp.arange(length, dtype=jnp.int32)[None, :]
    position = context[:, None] + step
    page = jnp.minimum(position // shape.page_size, table.shape[2] - 1)
    block = jnp.take_along_axis(table, page[:, None, :], axis=2, mode="promise_in_bounds").transpose(0, 2, 1)
    # Out of bounds is dropped.
    block = jnp.where((step < counts[:, None])[:, :, None], block, jnp.int32(shape.blocks))
    offset = jnp.broadcast_to((position % shape.page_size)[:, :, None], block.shape)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3, 4), inserted_window_dims=(0, 3), scatter_dims_to_operand_dims=(0, 3)
    )
    return jax.lax.scatter(
        pool,
        jnp.stack([block.reshape(-1), offset.reshape(-1)], axis=-1),
        encode(new, shape).reshape(batch * length * slots, shape.layers, 2, shape.kv_heads, shape.head_dim),
        dimensions,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )
