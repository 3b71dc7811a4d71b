"""The decoder of all families, as Flax NNX modules; what they differ in is in their `ModelConfig`.

A `Decoder` holds the part of a model that one device works with at one degree of tensor parallelism: `slots`
neighbouring virtual shards.  With `slots == K` it is the whole model; with fewer it is meant to run under
`jax.shard_map`, and each parameter's sharding annotation says how the ranks' parts form the global array.

Every weight is a list with one array per slot, so that the arrays can be wrapped around buffers that already lie on
the device. Attention over a cache is not the model's business: the caller passes it in as `Attend`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.block import Block
from nitsum_jax.models.layers.elementary import soft_cap
from nitsum_jax.models.layers.fixed_sums import computed_once
from nitsum_jax.models.layers.matmul import MatmulChoice, column_parallel, embedding_rows
from nitsum_jax.models.layers.norms import rms_norm
from nitsum_jax.models.layers.parameters import Initializer
from nitsum_jax.models.layers.reduction import Ranks
from nitsum_jax.models.layers.rope import rotations_of

# (layer, q[B, T, S, H/K, A], k[B, T, S, G/K, A], v[B, T, S, G/K, A]) -> f32[B, T, S, H/K, A], where S counts slots.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class Decoder(nnx.Module):
    """One device's part of a decoder.

    Attributes:
      slots: number of virtual shards held, K / TP.
      ranks: the devices that run a step together.
      matmul: form of the matrix products.
    """

    def __init__(
        self,
        config: ModelConfig,
        cut: ModelCut,
        *,
        slots: int,
        dtype: jnp.dtype | type = jnp.float32,
        ranks: Ranks = Ranks(),
        matmul: MatmulChoice = MatmulChoice(),
        rngs: nnx.Rngs | None = None,
    ):
        """Makes the modules, with random weights, or zeros without `rngs` (where only shapes matter: much faster)."""
        if slots * ranks.size != cut.num_vshards:
            raise ValueError(f"{slots} slots on {ranks.size} devices do not make {cut.num_vshards} virtual shards")
        self.config = config
        self.cut = cut
        self.slots = slots
        self.ranks = ranks
        self.matmul = matmul
        new = Initializer(slots, dtype, rngs)
        self.embed = Table(cut.vocab, config.d_model, new)
        self.layers = nnx.List([Block(cut, new) for _ in range(config.num_layers)])
        self.final_norm = new.ones(config.d_model)
        if not config.tied_head:
            self.head = Table(cut.vocab, config.d_model, new)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """Runs all layers.

        Args:
          tokens: i32[B, T] token ids.
          positions: i32[B, T] positions in their sequences.
          attend: attention over old and new keys and values.

        Returns:
          f32[B, T, D], before the final norm; the same bits on every rank.
        """
        x = self._embed(tokens)
        ropes = [self.config.rope_of(index) for index in range(self.config.num_layers)]
        rotation = {one: rotations_of(positions, one, self.config.rotary_width) for one in ropes if one is not None}
        for index, (block, rope) in enumerate(zip(self.layers, ropes, strict=True)):
            x = block(x, None if rope is None else rotation[rope], functools.partial(attend, index), self)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """`f32[R, D] -> f32[R, S * V/K]`: this device's slice of the vocabulary; rows that pad V are -inf."""
        x = self.normed(x)
        table = self.embed if self.config.tied_head else self.head
        parts = [column_parallel(x, slot[...], self.matmul) for slot in table.table]
        logits = jnp.concatenate(parts, axis=-1)
        if self.config.logit_scale != 1:
            logits = logits * jnp.float32(self.config.logit_scale)
        logits = soft_cap(logits, self.config.logit_soft_cap)
        if self.cut.vocab * self.cut.num_vshards == self.config.vocab_size:
            return logits
        ids = self.vocab_offset() + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.where(ids[None, :] < self.config.vocab_size, logits, -jnp.inf)

    def normed(self, x: jax.Array) -> jax.Array:
        """`f32[R, D] -> f32[R, D]`, the final norm."""
        return rms_norm(x, self.final_norm[...], self.config.norm_eps, self.config.norm_offset)

    def vocab_offset(self) -> jax.Array:
        """First vocabulary id of this device's slice, i32[]."""
        return self.ranks.index() * jnp.int32(self.slots * self.cut.vocab)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # Each virtual shard gives its own rows and zero for all others; adding zeros is exact.
        parts = []
        for slot, table in enumerate(self.embed.table):
            local = tokens - (self.vocab_offset() + jnp.int32(slot * self.cut.vocab))
            rows = embedding_rows(table[...], jnp.clip(local, 0, self.cut.vocab - 1))
            held = (local >= 0) & (local < self.cut.vocab)
            parts.append(jnp.where(held[..., None], rows, jnp.float32(0)))
        x = self.ranks.sum(parts)
        if self.config.embedding_scale == 1:
            return x
        return computed_once(x * jnp.float32(self.config.embedding_scale))


class Table(nnx.Module):
    """Vocabulary rows, `[V/K, D]` per slot: the embedding, or an untied head."""

    def __init__(self, rows: int, width: int, new: Initializer):
        self.table = new.cut(rows, width)
