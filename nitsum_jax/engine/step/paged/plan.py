"""How the rows of an attention are cut into the programs of a kernel, and its arrays arranged for them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.models.config import AttentionVariant

_LEAST_KEYS = 16  # of a product on a GPU's tensor cores


@dataclasses.dataclass(frozen=True)
class RowLimits:
    """What one kind of kernel takes at a time.

    Attributes:
      least_rows: rows of a program are a multiple of it.
      most_rows: rows of a program with several new tokens, unless it has more heads.
      power_of_two: whether the heads of a program are padded to a power of two.
    """

    least_rows: int
    most_rows: int
    power_of_two: bool


@dataclasses.dataclass(frozen=True)
class Plan:
    """One attention: its sizes, and those of a program's tiles.

    Nothing here depends on how many virtual shards lie on a device: a program is one sequence of one of them, so its
    tiles, and with them its bits, are the same at every TP.

    Attributes:
      shape: the pool's shape.
      length: T, new tokens of a row.
      per_group: H/G, query heads of a KV head.
      heads: `per_group` with padding.
      tile: new tokens of a program; a power of two.
      keys: new tokens that it attends to at a time; a multiple of `tile`.
      variant: what a token sees, and how its scores are made.
    """

    shape: PoolShape
    length: int
    per_group: int
    heads: int
    tile: int
    keys: int
    variant: AttentionVariant

    @property
    def window(self) -> int | None:
        """So many tokens a token sees, itself among them; None: all."""
        return self.variant.window

    @property
    def soft_cap(self) -> float | None:
        """Scores are bent to lie between plus and minus this; None: they are not."""
        return self.variant.soft_cap

    @property
    def tiles(self) -> int:
        """Programs per sequence and virtual shard (or KV head)."""
        return self.padded_length // self.tile

    @property
    def rows(self) -> int:
        """Rows of a program."""
        return self.heads * self.tile

    @property
    def padded_length(self) -> int:
        """T in whole tiles of queries and of keys."""
        return self.length if self.length == 1 else -(-self.length // self.keys) * self.keys

    @property
    def operand_dtype(self) -> jnp.dtype:
        """In which the products take their operands."""
        return jnp.dtype(self.shape.dtype)

    def first_seen(self, context: jax.Array, tile: jax.Array) -> jax.Array:
        """The first position that any row of a tile sees."""
        if self.window is None:
            return jnp.zeros_like(context)
        return jnp.maximum(context + tile * jnp.int32(self.tile) + jnp.int32(1 - self.window), 0)

    def offsets(self, tile: jax.Array, columns: int) -> jax.Array:
        """i32[rows, columns]: which new token each row of a tile is."""
        row = jax.lax.broadcasted_iota(jnp.int32, (self.rows, columns), 0)
        return tile * jnp.int32(self.tile) + (row & jnp.int32(self.tile - 1))

    def sees(self, query: jax.Array, key: jax.Array) -> jax.Array:
        """bool: whether a token at position `query` sees the one at `key`."""
        seen = key <= query
        return seen if self.window is None else seen & (key > query - jnp.int32(self.window))


def make_plan(
    shape: PoolShape, length: int, per_group: int, limits: RowLimits, variant: AttentionVariant = AttentionVariant()
) -> Plan:
    """Sizes the tiles."""
    heads = 1 << (per_group - 1).bit_length() if limits.power_of_two else per_group
    if length == 1:
        heads = -(-heads // limits.least_rows) * limits.least_rows
        return Plan(shape, length, per_group, heads, 1, 1, variant)
    fits = 1 << (max(1, limits.most_rows // heads).bit_length() - 1)
    tile = max(limits.least_rows // math.gcd(heads, limits.least_rows), min(fits, 1 << (length - 1).bit_length()))
    return Plan(shape, length, per_group, heads, tile, max(_LEAST_KEYS, tile), variant)


def arrange_queries(q: jax.Array, plan: Plan) -> jax.Array:
    """`f32[B, T, S, H/K, A] -> f32[B S, G/K, tiles, rows, A]`, scaled; what is padded is 0."""
    batch, length, slots, _, width = q.shape
    groups, missing = plan.shape.kv_heads, plan.padded_length - length
    q = q.reshape(batch, length, slots, groups, plan.per_group, width) * jnp.float32(plan.variant.scale_of(width))
    pads = [(0, 0), (0, missing), (0, 0), (0, 0), (0, plan.heads - plan.per_group), (0, 0)]
    q = jnp.pad(q, pads).reshape(batch, plan.tiles, plan.tile, slots, groups, plan.heads, width)
    return q.transpose(0, 3, 4, 1, 5, 2, 6).reshape(batch * slots, groups, plan.tiles, plan.rows, width)


def arrange_new(x: jax.Array, plan: Plan) -> jax.Array:
    """Keys or values `f32[B, T, S, G/K, A] -> [B S, G/K, T padded, A]`; of several tokens as the products take them."""
    batch, length, slots, groups, width = x.shape
    x = jnp.pad(x, [(0, 0), (0, plan.padded_length - length), (0, 0), (0, 0), (0, 0)])
    x = x.transpose(0, 2, 3, 1, 4).reshape(batch * slots, groups, -1, width)
    return x if length == 1 else x.astype(plan.operand_dtype)


def restore(out: jax.Array, plan: Plan, batch: int) -> jax.Array:
    """`f32[B S, G/K, tiles, rows, A] -> f32[B, T, S, H/K, A]`: undoes `arrange_queries`."""
    groups, width = out.shape[1], out.shape[-1]
    slots = out.shape[0] // batch
    out = out.reshape(batch, slots, groups, plan.tiles, plan.heads, plan.tile, width)[:, :, :, :, : plan.per_group]
    out = out.transpose(0, 3, 5, 1, 2, 4, 6).reshape(batch, plan.padded_length, slots, -1, width)
    return out[:, : plan.length]
