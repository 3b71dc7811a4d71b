"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the convention of Hugging Face checkpoints."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.models.config import Rope
from nitsum_jax.models.layers.fixed_sums import computed_once


def inverse_frequencies(rope: Rope, width: int) -> np.ndarray:
    """Radians per position of each pair of features, f64[width/2], scaled as the model says."""
    frequencies = 1.0 / rope.theta ** (np.arange(0, width, 2, dtype=np.float64) / width)
    return frequencies if rope.scaling is None else frequencies / rope.scaling.divisors(width, rope.theta)


def rotations_of(positions: jax.Array, rope: Rope, width: int) -> tuple[jax.Array, jax.Array]:
    """`rotations` as the layers take them that turn `width` features in this way."""
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return rotations(positions, inverse_frequencies(rope, width), factor)


def rotations(positions: jax.Array, inverse: np.ndarray, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of `positions[B, T]` for every feature pair: two of f32[B, T, A/2].

    XLA's exponential gives other bits in a vectorised loop than in a plain one, and nothing says that its cosine does
    not. So this is one of our own, of operations that are rounded alike everywhere.  The angle is held as a fraction
    of a turn in integers, where what is beyond a whole turn simply overflows: it is as exact at position 100,000 as at
    position 1.

    Args:
      positions: i32[B, T], less than 2**17.
      inverse: f64[A/2], radians per position.
      factor: of both.
    """
    turns = np.floor(np.remainder(inverse / (2 * math.pi), 1.0) * 2.0**47).astype(np.uint64)
    high = jnp.asarray((turns >> np.uint64(15)).astype(np.uint32))  # of 2**-32 turns per position
    low = jnp.asarray((turns & np.uint64(0x7FFF)).astype(np.uint32))  # of 2**-47 turns
    position = positions.astype(jnp.uint32)[..., None]
    phase = position * high[None, None] + ((position * low[None, None]) >> jnp.uint32(15))
    quarter = (phase + jnp.uint32(1 << 29)) >> jnp.uint32(30)  # nearest quarter turn, 0 to 3
    rest = jax.lax.bitcast_convert_type(phase - (quarter << jnp.uint32(30)), jnp.int32)
    r = rest.astype(jnp.float32) * jnp.float32(math.pi / 2 / (1 << 30))  # -pi/4 to pi/4
    z = r * r
    # The polynomials of Cephes' sinf and cosf.
    sine = ((jnp.float32(-1.9515295891e-4) * z + jnp.float32(8.3321608736e-3)) * z + jnp.float32(-1.6666654611e-1)) * z
    sine = sine * r + r
    cosine = (jnp.float32(2.443315711809948e-5) * z + jnp.float32(-1.388731625493765e-3)) * z
    cosine = (cosine + jnp.float32(4.166664568298827e-2)) * (z * z) - jnp.float32(0.5) * z + jnp.float32(1)
    swap = (quarter & jnp.uint32(1)) == 1
    cos = jnp.where(swap, sine, cosine)
    sin = jnp.where(swap, cosine, sine)
    cos = jnp.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = jnp.where(quarter >= 2, -sin, sin)
    if factor != 1:
        cos, sin = cos * jnp.float32(factor), sin * jnp.float32(factor)
    return computed_once(cos), computed_once(sin)


@jax.jit  # traced once for all layers
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x[B, T, ..., A]`, pairing feature i with feature i + A/2; or its first features, where there are fewer.

    Args:
      x: queries or keys.
      cos: `f32[B, T, R/2]`; features from R on stay.
      sin: as cos.
    """
    turning = 2 * cos.shape[-1]
    if turning < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :turning], cos, sin), x[..., turning:]], axis=-1)
    first, second = jnp.split(x, 2, axis=-1)
    axes = tuple(range(2, x.ndim - 1))
    cos, sin = jnp.expand_dims(cos, axes), jnp.expand_dims(sin, axes)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
