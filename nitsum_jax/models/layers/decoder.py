"""The decoder family: Llama 2/3, SmolLM2, Mistral (full attention), Qwen2/2.5 and Qwen3 dense, as Flax NNX modules.

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

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.fixed_sums import sum_of_squares
from nitsum_jax.models.layers.matmul import MatmulChoice, column_parallel, embedding_rows, row_parallel
from nitsum_jax.models.layers.reduction import Ranks
from nitsum_jax.models.layers.rope import inverse_frequencies, rotate, rotations

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
        new = _Initializer(slots, dtype, rngs)
        self.embed = Table(cut.vocab, config.d_model, new)
        self.layers = nnx.List([Block(config, cut, new) for _ in range(config.num_layers)])
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
        cos, sin = rotations(positions, inverse_frequencies(self.config))
        for index, block in enumerate(self.layers):
            x = block(x, cos, sin, functools.partial(attend, index), self)
        return x

    def logits(self, x: jax.Array) -> jax.Array:
        """`f32[R, D] -> f32[R, S * V/K]`: this device's slice of the vocabulary; rows that pad V are -inf."""
        x = self.normed(x)
        table = self.embed if self.config.tied_head else self.head
        parts = [column_parallel(x, slot[...], self.matmul) for slot in table.table]
        logits = jnp.concatenate(parts, axis=-1)
        if self.cut.vocab * self.cut.num_vshards == self.config.vocab_size:
            return logits
        ids = self.vocab_offset() + jnp.arange(logits.shape[-1], dtype=jnp.int32)
        return jnp.where(ids[None, :] < self.config.vocab_size, logits, -jnp.inf)

    def normed(self, x: jax.Array) -> jax.Array:
        """`f32[R, D] -> f32[R, D]`, the final norm."""
        return rms_norm(x, self.final_norm[...], self.config.norm_eps)

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
        return self.ranks.sum(parts)


class Block(nnx.Module):
    """Attention and MLP with their residual connections."""

    def __init__(self, config: ModelConfig, cut: ModelCut, new: "_Initializer"):
        self.attn = Attention(config, cut, new)
        self.mlp = Mlp(config, cut, new)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        model: Decoder,
    ) -> jax.Array:
        """`f32[B, T, D] -> f32[B, T, D]`."""
        x = x + model.ranks.sum(self.attn(x, cos, sin, attend, model))
        return x + model.ranks.sum(self.mlp(x, model))


class Attention(nnx.Module):
    """Grouped-query attention; per slot q, k and v are one weight, `[(H/K + 2 G/K) A, D]`."""

    def __init__(self, config: ModelConfig, cut: ModelCut, new: "_Initializer"):
        rows = (cut.q_heads + 2 * cut.kv_heads) * config.head_dim
        self.norm = new.ones(config.d_model)
        self.qkv = new.cut(rows, config.d_model)
        if config.qkv_bias:
            self.qkv_bias = new.cut_bias(rows)
        if config.qk_norm:
            self.q_norm = new.ones(config.head_dim)
            self.k_norm = new.ones(config.head_dim)
        self.out = new.cut(cut.q_heads * config.head_dim, config.d_model)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        model: Decoder,
    ) -> list[jax.Array]:
        """One partial result f32[B, T, D] per slot."""
        config, cut = model.config, model.cut
        x = rms_norm(x, self.norm[...], config.norm_eps)
        parts = []
        for slot, weight in enumerate(self.qkv):
            y = column_parallel(x, weight[...], model.matmul)
            if config.qkv_bias:
                y = y + self.qkv_bias[slot][...].astype(jnp.float32)[None, None, :]
            parts.append(y.reshape(*y.shape[:2], -1, config.head_dim))
        # All slots at once from here on: a quarter of the code for the compiler, where there are four.
        heads = jnp.stack(parts, axis=2)
        q, k, v = jnp.split(heads, [cut.q_heads, cut.q_heads + cut.kv_heads], axis=3)
        if config.qk_norm:
            q = rms_norm(q, self.q_norm[...], config.norm_eps)
            k = rms_norm(k, self.k_norm[...], config.norm_eps)
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        rows = attended.reshape(*attended.shape[:3], -1)
        return [row_parallel(rows[:, :, slot], weight[...], model.matmul) for slot, weight in enumerate(self.out)]


class Mlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202); per slot gate and up are one weight, `[2 F/K, D]`."""

    def __init__(self, config: ModelConfig, cut: ModelCut, new: "_Initializer"):
        self.norm = new.ones(config.d_model)
        self.gate_up = new.cut(2 * cut.d_mlp, config.d_model)
        self.down = new.cut(cut.d_mlp, config.d_model)

    def __call__(self, x: jax.Array, model: Decoder) -> list[jax.Array]:
        """One partial result f32[B, T, D] per slot."""
        x = rms_norm(x, self.norm[...], model.config.norm_eps)
        parts = []
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            gate, up = jnp.split(column_parallel(x, gate_up[...], model.matmul), 2, axis=-1)
            parts.append(row_parallel(jax.nn.silu(gate) * up, down[...], model.matmul))
        return parts


class Table(nnx.Module):
    """Vocabulary rows, `[V/K, D]` per slot: the embedding, or an untied head."""

    def __init__(self, rows: int, width: int, new: "_Initializer"):
        self.table = new.cut(rows, width)


# Traced once for all layers; XLA makes one program of it all the same.
@functools.partial(jax.jit, static_argnames="eps")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32."""
    width = x.shape[-1]
    # sqrt(D) / sqrt(sum + D eps) rather than 1 / sqrt(sum / D + eps): no product that is added to something.
    inverse = jax.lax.rsqrt(sum_of_squares(x)[..., None] + jnp.float32(width * eps)) * jnp.float32(width**0.5)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return x * inverse * scale


class _Initializer:
    """Makes parameters with random values and the annotation of how ranks share them."""

    def __init__(self, slots: int, dtype: jnp.dtype | type, rngs: nnx.Rngs | None):
        self._slots = slots
        self._dtype = dtype
        self._rngs = rngs

    def cut(self, rows: int, width: int) -> nnx.List:
        """One `[rows, width]` matrix per slot; ranks lie along the first axis."""
        return nnx.List(
            [
                nnx.Param(self._matrix(rows, width), out_sharding=(TP_AXIS, None), eager_sharding=False)
                for _ in range(self._slots)
            ]
        )

    def _matrix(self, rows: int, width: int) -> jax.Array:
        if self._rngs is None:
            return jnp.zeros((rows, width), self._dtype)
        return nnx.initializers.normal(width**-0.5)(self._rngs.params(), (rows, width), self._dtype)

    def cut_bias(self, rows: int) -> nnx.List:
        """One `f32[rows]` bias per slot."""
        return nnx.List(
            [
                nnx.Param(jnp.zeros((rows,), jnp.float32), out_sharding=(TP_AXIS,), eager_sharding=False)
                for _ in range(self._slots)
            ]
        )

    def ones(self, width: int) -> nnx.Param:
        """A norm's scale, the same on every rank."""
        return nnx.Param(jnp.ones((width,), jnp.float32), out_sharding=(None,), eager_sharding=False)
