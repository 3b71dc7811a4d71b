"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the convention of Hugging Face checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each pair of features, f32[A/2], scaled as Llama 3 does where the config says so."""
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between are blended.
        wavelength = 2 * math.pi / frequencies
        longest = scaling.original_max_context / scaling.low_freq_factor
        shortest = scaling.original_max_context / scaling.high_freq_factor
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = (scaling.original_max_context / wavelength - scaling.low_freq_factor) / span if span else 0.0
        blended = (1 - keep) * frequencies / scaling.factor + keep * frequencies
        stretched = frequencies / scaling.factor
        frequencies = np.where(wavelength > longest, stretched, np.where(wavelength < shortest, frequencies, blended))
    return frequencies.astype(np.float32)


def rotations(positions: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `positions[B, T]` for every feature pair: two of f32[B, T, A/2]."""
    angles = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(inverse)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x[B, T, heads, A]`, pairing feature i with feature i + A/2."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
