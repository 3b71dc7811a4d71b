"""Attention of new tokens over a paged KV pool.

A block is `page_size` tokens of one virtual shard's KV heads with all layers: the pool of a device is
`[blocks, L, 2, W, G/K, A]`; with integers of 8 bits the last axis has the scale of each token and head behind them, so
that a block stays one piece whatever is stored.  Keys and values of the tokens of the present step are not in the pool
yet: they are attended to directly, or laid among what was read from it, and written in one go at the end of the step,
so that within a step the pool is only read, then written in place.

Old tokens are taken in chunks of a fixed number of pages with a running maximum and sum (online softmax, arXiv
1805.02867).  A chunk that lies wholly behind a row's context leaves that row's result untouched to the bit.  Hence a
row's result depends on its own context alone, not on the longest context of the batch, and one executable serves all
context lengths.

A token that is masked has weight 0, and 0 times NaN is NaN: what one broken token leaves in a block would reach whoever
gets the block next.  So values are always finite (`contained`), and what is wrong with a token shows in its keys alone,
which make no difference where they are masked.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from nitsum_jax.engine.step.forms import PoolForm
from nitsum_jax.models.layers.fixed_sums import largest, sum_of_weights

KV_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3")
# Bytes of the scale behind a row of integers.
_SCALE_BYTES = 2
_LARGEST_INT8 = 127
_LARGEST_FLOAT8 = 448.0
# Of the smallest normal bfloat16 as a float32: no scale is smaller, so that dividing by one is exact and finite.
_LEAST_SCALE_BITS = 0x00800000
# Of the largest bfloat16 as a float32: more would become an infinity in a bfloat16 pool.
_LARGEST_BITS = 0x7F7F0000


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """Shape of one device's pool.

    Attributes:
      blocks: N, number of blocks.
      layers: L.
      page_size: W, tokens per block.
      kv_heads: G/K, KV heads of one virtual shard.
      head_dim: A.
      dtype: one of KV_DTYPES; see `encode`.
      form: how it is stored, read and written.
    """

    blocks: int
    layers: int
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: str
    form: PoolForm = PoolForm()

    @property
    def storage_dtype(self) -> jnp.dtype:
        """The type in which the pool is stored."""
        if self.dtype == "float8_e4m3":
            return jnp.dtype(jnp.uint8 if self.form.as_integers else jnp.float8_e4m3fn)
        return jnp.dtype(jnp.uint16 if self.dtype == "bfloat16" and self.form.as_integers else self.dtype)

    @property
    def stored_bits(self) -> int:
        """Of each number."""
        return 8 * self.storage_dtype.itemsize

    @property
    def stored_width(self) -> int:
        """Numbers in storage type that the keys or values of a token take per head: A, and what its scale takes."""
        return self.head_dim + (_SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block, `[L, 2, W, G/K, stored width]`."""
        return (self.layers, 2, self.page_size, self.kv_heads, self.stored_width)

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
        return max(1, self.form.chunk_tokens // self.page_size)

    def pages(self, tokens: int) -> int:
        """Pages of a block table that holds `tokens` tokens, rounded up to whole chunks."""
        chunk = self.chunk_pages * self.page_size
        return -(-tokens // chunk) * self.chunk_pages


def encode(values: jax.Array, shape: PoolShape) -> jax.Array:
    """`f32[..., A]`, see `contained`, -> `[..., stored width]` in the pool's storage type.

    In int8 a row has a scale: the greatest of its sizes / 127, rounded up to a bfloat16, so that an integer times it is
    exact in float32, and a compiler that fuses the product with what follows changes no bit.
    """
    if shape.dtype == "int8":
        return _encode_int8(values)
    if shape.dtype == "float8_e4m3":
        # The type has no infinity, and what is too large would become NaN; NaN stays what it is.
        small = jnp.clip(values, -_LARGEST_FLOAT8, _LARGEST_FLOAT8).astype(jnp.float8_e4m3fn)
        return jax.lax.bitcast_convert_type(small, shape.storage_dtype)
    if shape.storage_dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)
    return values.astype(shape.storage_dtype)


def decode(stored: jax.Array, shape: PoolShape) -> jax.Array:
    """`[..., stored width]` in the pool's storage type -> `f32[..., A]`."""
    if shape.dtype == "int8":
        integers, scale = stored[..., : shape.head_dim], stored[..., shape.head_dim :]
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint16).astype(jnp.uint32) << jnp.uint32(16)
        return integers.astype(jnp.float32) * jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]
    if shape.dtype == "float8_e4m3":
        return jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn).astype(jnp.float32)
    if shape.storage_dtype == jnp.uint16:
        # A shift, not a bfloat16 conversion: XLA:CPU vectorises it.
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << jnp.uint32(16), jnp.float32)
    return stored.astype(jnp.float32)


def _encode_int8(values: jax.Array) -> jax.Array:
    # As integers, as in `contained`: one greatest in whatever order, and NaN on top.
    greatest = jax.lax.bitcast_convert_type(largest(_size_bits(values)), jnp.float32)
    bits = jax.lax.bitcast_convert_type(greatest / jnp.float32(_LARGEST_INT8), jnp.int32)
    bits = jnp.maximum((bits + jnp.int32(0xFFFF)) >> 16, jnp.int32(_LEAST_SCALE_BITS >> 16))
    scale = jax.lax.bitcast_convert_type(bits << 16, jnp.float32)[..., None]
    # A row of NaN has NaN for its scale, which makes it NaN again.
    integers = jnp.where(jnp.isnan(values), jnp.float32(0), jnp.round(values / scale)).astype(jnp.int8)
    behind = jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.int8)
    return jnp.concatenate([integers, behind], axis=-1)


@jax.jit  # traced once for all layers
def contained(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values `f32[..., A]` as `paged_attention` and `write_tokens` take them; what is finite stays as it is.

    Where a token has an infinity or a NaN in keys or values, its keys become NaN, so that whoever attends to it gets
    NaN, and its values 0.
    """
    # The bits without the sign sort like the size, NaN on top, and integers have one greatest in whatever order.
    size = jnp.maximum(_size_bits(k), _size_bits(v))
    sound = (largest(size) <= _LARGEST_BITS)[..., None]
    return jnp.where(sound, k, jnp.float32(jnp.nan)), jnp.where(sound, v, jnp.float32(0))


def _size_bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)


@functools.partial(jax.jit, static_argnames="shape")  # traced once for all layers
def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: int | jax.Array,
    page_table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
) -> jax.Array:
    """Attends T new tokens per row to the row's context in the pool and, causally, to themselves.

    Args:
      q: f32[B, T, S, H/K, A], one device's S virtual shards.
      k: f32[B, T, S, G/K, A] of the new tokens, see `contained`.
      v: as k.
      pool: `[N, L, 2, W, G/K, stored width]` in storage type.
      layer: which layer of the pool.
      page_table: i32[B, S, P], blocks of each row and shard in order.
      context: i32[B], tokens in the pool per row.
      shape: the pool's shape.

    Returns:
      f32[B, T, S, H/K, A].
    """
    batch, length, slots, heads, width = q.shape
    groups = k.shape[3]
    per_group = heads // groups
    # Sequences, virtual shards and KV heads make one batch axis n of the products.  It is never 1: XLA writes a
    # product without a batch differently, and rounds it differently, and a shard alone on its device must get the bits
    # it gets in company.
    whole = batch * slots * groups
    copies = 2 if whole == 1 else 1

    def merged(x: jax.Array) -> jax.Array:
        """`[B, S, G/K, rows, A] -> [n, rows, A]`."""
        x = x.reshape(whole, *x.shape[3:])
        return jnp.concatenate([x] * copies) if copies > 1 else x

    def fetch(index: jax.Array, which: int) -> jax.Array:
        """Keys (0) or values (1) of chunk `index`: f32[n, tokens, A]."""
        pages = jax.lax.dynamic_slice_in_dim(page_table, index * chunk, chunk, axis=2)
        rows = pages * jnp.int32(shape.layers * 2) + layer * jnp.int32(2) + jnp.int32(which)
        stored = flat.at[rows].get(mode="promise_in_bounds")
        x = decode(stored.reshape(batch, slots, tokens, groups, shape.stored_width), shape)
        if joins:
            new = (k, v)[which].transpose(0, 2, 1, 3, 4)
            x = jnp.where((positions(index)[None] == context[:, None])[:, None, :, None, None], new, x)
        return merged(x.transpose(0, 1, 3, 2, 4))

    def positions(index: jax.Array) -> jax.Array:
        return index * jnp.int32(tokens) + jnp.arange(tokens, dtype=jnp.int32)

    # A single new token is laid among the old ones, at its place in its chunk, where that is cheap: no products of its
    # own.  An accelerator would write the whole chunk once more.
    joins = length == 1 and not shape.form.by_rows
    rows = per_group * length
    scaled = q.reshape(batch, length, slots, groups, per_group, width) * jnp.float32(width**-0.5)
    queries = merged(scaled.transpose(0, 2, 3, 4, 1, 5).reshape(batch, slots, groups, rows, width))
    if joins:
        # Every row sees a token in the first chunk, so that the running maximum is finite from then on.
        top = jnp.full((whole * copies, rows), -jnp.inf)
        total = jnp.zeros((whole * copies, rows), jnp.float32)
        out = jnp.zeros_like(queries)
        reach = context + jnp.int32(1)
    else:
        # The new tokens among themselves: the running maximum starts finite, because every token sees itself.  A
        # product of single rows would be a sum to XLA, in an order that depends on how many there are: it gets a second
        # row.
        new_values = merged(v.transpose(0, 2, 3, 1, 4))
        least = queries if rows > 1 else jnp.pad(queries, ((0, 0), (0, 1), (0, 0)))
        scores = jnp.einsum("nra,nua->nru", least, merged(k.transpose(0, 2, 3, 1, 4)))[:, :rows]
        if length > 1:
            seen = jnp.tile(jnp.tri(length, dtype=bool), (per_group, 1))[None]
            scores = jnp.where(seen, scores, -jnp.inf)
            top = largest(scores)
            weights = exp_nonpositive(scores - top[..., None])
            total = sum_of_weights(weights)
            out = jnp.einsum("nru,nua->nra", weights, new_values)
        else:  # a token that sees itself alone has weight 1
            top = scores[..., 0]
            total = jnp.where(jnp.isnan(top), top, jnp.float32(1))
            out = jnp.broadcast_to(new_values, queries.shape)
        reach = context

    chunk = shape.chunk_pages
    tokens = chunk * shape.page_size
    # A row is a page of keys or values of one layer.  On a CPU no axis is split further: an axis of length 1 (one KV
    # head in a virtual shard) can stand anywhere in a layout, and XLA:CPU copies the whole pool in every step to put it
    # in its place.
    row = groups * shape.stored_width
    page = (shape.page_size, row) if shape.form.by_rows else (shape.page_size * row,)
    flat = pool.reshape(shape.blocks * shape.layers * 2, *page)
    chunks = (jnp.max(reach) + jnp.int32(tokens - 1)) // jnp.int32(tokens)
    reach = jnp.broadcast_to(reach[:, None, None], (batch, slots, groups)).reshape(whole)
    reach = jnp.concatenate([reach] * copies)[:, None, None]

    def attend_chunk(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = carry
        scores = jnp.einsum("nra,nta->nrt", queries, fetch(index, 0))
        scores = jnp.where(positions(index)[None, None, :] < reach, scores, -jnp.inf)
        new_top = jnp.maximum(top, largest(scores))
        shrink = exp_nonpositive(top - new_top)
        weights = exp_nonpositive(scores - new_top[..., None])
        total = total * shrink + sum_of_weights(weights)
        out = out * shrink[..., None] + jnp.einsum("nrt,nta->nra", weights, fetch(index, 1))
        return new_top, total, out

    _, total, out = jax.lax.fori_loop(jnp.int32(0), chunks, attend_chunk, (top, total, out))
    out = (out / total[..., None])[:whole].reshape(batch, slots, groups, per_group, length, width)
    return out.transpose(0, 4, 1, 2, 3, 5).reshape(batch, length, slots, heads, width)


def exp_nonpositive(x: jax.Array) -> jax.Array:
    """e**x for x <= 0 (-inf included) within 2 units in the last place; below -87 it is 0.

    The exponential of XLA:CPU gives other bits in a large array than in a small one, because one loop is vectorised
    and the other is not.  How large the arrays of a device are depends on the layout, so the softmax needs one of its
    own: Cody-Waite reduction and the polynomial of Cephes' expf, made of operations that are rounded alike everywhere.
    """
    bounded = jnp.maximum(x, jnp.float32(-87.0))
    power = jnp.floor(bounded * jnp.float32(1.44269504088896341) + jnp.float32(0.5))
    r = bounded - power * jnp.float32(0.693359375) - power * jnp.float32(-2.12194440e-4)
    y = jnp.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + jnp.float32(coefficient)
    y = y * (r * r) + r + jnp.float32(1)
    scale = jax.lax.bitcast_convert_type((power.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < -87, jnp.float32(0), y * scale)


def write_tokens(
    pool: jax.Array, new: jax.Array, page_table: jax.Array, context: jax.Array, counts: jax.Array, shape: PoolShape
) -> jax.Array:
    """Writes the keys and values of a step's tokens, all layers at once.

    Args:
      pool: `[N, L, 2, W, G/K, stored width]` in storage type; donated by the caller, updated in place.
      new: f32[B, T, S, L, 2, G/K, A], see `contained`.
      page_table: i32[B, S, P].
      context: i32[B], position of each row's first new token.
      counts: i32[B], how many of the T tokens are real; the rest is not written.
      shape: the pool's shape.

    Returns:
      The pool.
    """
    batch, length, slots = new.shape[:3]
    step = jnp.arange(length, dtype=jnp.int32)[None, :]
    position = context[:, None] + step
    page = jnp.minimum(position // shape.page_size, page_table.shape[2] - 1)
    block = jnp.take_along_axis(page_table, page[:, None, :], axis=2, mode="promise_in_bounds").transpose(0, 2, 1)
    # Out of bounds is dropped.
    block = jnp.where((step < counts[:, None])[:, :, None], block, jnp.int32(shape.blocks))
    offset = jnp.broadcast_to((position % shape.page_size)[:, :, None], block.shape)
    if shape.form.by_rows:
        return _write_rows(pool, new, block, offset, shape)
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3, 4), inserted_window_dims=(0, 3), scatter_dims_to_operand_dims=(0, 3)
    )
    return jax.lax.scatter(
        pool,
        jnp.stack([block.reshape(-1), offset.reshape(-1)], axis=-1),
        encode(new, shape).reshape(batch * length * slots, shape.layers, 2, shape.kv_heads, shape.stored_width),
        dimensions,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _write_rows(pool: jax.Array, new: jax.Array, block: jax.Array, offset: jax.Array, shape: PoolShape) -> jax.Array:
    """`write_tokens` by rows of all heads: one per token, layer, and keys or values; block and offset: i32[B, T, S]."""
    parts = shape.layers * 2
    width = shape.kv_heads * shape.stored_width
    part = jnp.arange(parts, dtype=jnp.int32)[None, None, None, :]
    # A block behind the last makes rows behind the last.
    row = (block[..., None] * jnp.int32(parts) + part) * jnp.int32(shape.page_size) + offset[..., None]
    flat = pool.reshape(shape.blocks * parts * shape.page_size, width)
    values = encode(new, shape).reshape(-1, width)
    return flat.at[row.reshape(-1)].set(values, mode="drop", unique_indices=True).reshape(pool.shape)
