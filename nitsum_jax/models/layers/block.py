"""One layer of the decoder: attention and MLP with their norms and residual connections."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.elementary import gelu_tanh
from nitsum_jax.models.layers.fixed_sums import computed_once
from nitsum_jax.models.layers.matmul import MatmulChoice, column_parallel, row_parallel
from nitsum_jax.models.layers.norms import rms_norm, wide_norms
from nitsum_jax.models.layers.parameters import Initializer
from nitsum_jax.models.layers.reduction import Ranks
from nitsum_jax.models.layers.rope import rotate

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": gelu_tanh}
Rotation = tuple[jax.Array, jax.Array]  # cosines and sines
AttendInLayer = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # see `decoder.Attend`


class DecoderParts(Protocol):
    """What a layer needs of its decoder."""

    config: ModelConfig
    cut: ModelCut
    ranks: Ranks
    matmul: MatmulChoice


class Block(nnx.Module):
    """Attention and MLP with their residual connections."""

    def __init__(self, cut: ModelCut, new: Initializer):
        self.attn = Attention(cut, new)
        self.mlp = Mlp(cut, new)

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: AttendInLayer, model: DecoderParts
    ) -> jax.Array:
        """`f32[B, T, D] -> f32[B, T, D]`; q and k do not turn without a rotation."""
        x = x + _added(model, self.attn, self.attn(x, rotation, attend, model))
        return x + _added(model, self.mlp, self.mlp(x, model))


def _added(model: DecoderParts, part: "Attention | Mlp", partials: list[jax.Array]) -> jax.Array:
    """What a part adds to the residual stream.

    A product that is added may be rounded or not, as the compiler likes, so none is.
    """
    config, x = model.config, model.ranks.sum(partials)
    if config.post_norms:
        x = computed_once(rms_norm(x, part.post_norm[...], config.norm_eps, config.norm_offset))
    return x if config.residual_scale == 1 else computed_once(x * jnp.float32(config.residual_scale))


class Attention(nnx.Module):
    """Grouped-query attention; per slot q, k and v are one weight, `[(H/K + 2 G/K) A, D]`."""

    def __init__(self, cut: ModelCut, new: Initializer):
        config = cut.config
        rows = (cut.q_heads + 2 * cut.kv_heads) * config.head_dim
        if config.pre_norms:
            self.norm = new.ones(config.d_model)
        self.qkv = new.cut(rows, config.d_model)
        if config.qkv_bias:
            self.qkv_bias = new.cut_bias(rows)
        if config.qk_norm:
            wide = config.wide_qk_norm
            self.q_norm: Any = new.cut_ones(cut.q_heads * config.head_dim) if wide else new.ones(config.head_dim)
            self.k_norm: Any = new.cut_ones(cut.kv_heads * config.head_dim) if wide else new.ones(config.head_dim)
        self.out = new.cut(cut.q_heads * config.head_dim, config.d_model)
        if config.post_norms:
            self.post_norm = new.ones(config.d_model)

    def __call__(
        self, x: jax.Array, rotation: Rotation | None, attend: AttendInLayer, model: DecoderParts
    ) -> list[jax.Array]:
        """One partial result f32[B, T, D] per slot."""
        config, cut = model.config, model.cut
        if config.pre_norms:
            x = rms_norm(x, self.norm[...], config.norm_eps, config.norm_offset)
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
            q, k = self._normed(q, k, model)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        attended = attend(q, k, v)
        rows = attended.reshape(*attended.shape[:3], -1)
        return [row_parallel(rows[:, :, slot], weight[...], model.matmul) for slot, weight in enumerate(self.out)]

    def _normed(self, q: jax.Array, k: jax.Array, model: DecoderParts) -> tuple[jax.Array, jax.Array]:
        config = model.config
        if config.wide_qk_norm:
            q_scale, k_scale = (jnp.stack([slot[...] for slot in scale]) for scale in (self.q_norm, self.k_norm))
            return wide_norms(q, k, q_scale, k_scale, model.cut, model.ranks)
        return (
            rms_norm(q, self.q_norm[...], config.norm_eps, config.norm_offset),
            rms_norm(k, self.k_norm[...], config.norm_eps, config.norm_offset),
        )


class Mlp(nnx.Module):
    """Gated MLP, SwiGLU (arXiv 2002.05202) or GeGLU; per slot gate and up are one weight, `[2 F/K, D]`."""

    def __init__(self, cut: ModelCut, new: Initializer):
        config = cut.config
        if config.pre_norms:
            self.norm = new.ones(config.d_model)
        self.gate_up = new.cut(2 * cut.d_mlp, config.d_model)
        self.down = new.cut(cut.d_mlp, config.d_model)
        if config.post_norms:
            self.post_norm = new.ones(config.d_model)

    def __call__(self, x: jax.Array, model: DecoderParts) -> list[jax.Array]:
        """One partial result f32[B, T, D] per slot."""
        config = model.config
        if config.pre_norms:
            x = rms_norm(x, self.norm[...], config.norm_eps, config.norm_offset)
        activate = _ACTIVATIONS[config.activation]
        parts = []
        for gate_up, down in zip(self.gate_up, self.down, strict=True):
            gate, up = jnp.split(column_parallel(x, gate_up[...], model.matmul), 2, axis=-1)
            parts.append(row_parallel(activate(gate) * up, down[...], model.matmul))
        return parts
