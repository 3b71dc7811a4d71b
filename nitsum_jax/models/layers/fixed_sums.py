"""Sums whose every bit is fixed by the numbers added, whatever XLA makes of the code around them.

XLA adds up an axis in an order that depends on the size of the array and on what it fuses the sum with, and both
depend on how many virtual shards lie on a device.  A product that is added to something may besides be rounded or not
(fused multiply-add), as the compiler likes.  So the numbers are brought to integers first, where neither order nor
grouping can change a result.  It is also much less code for the compiler than a tree of float additions written out.
"""

import jax
import jax.numpy as jnp

# Bits of each of the two integers that a number becomes in `sum_of_squares`.
_LIMB_BITS = 11
# So many products of two such integers fit in an i32.
_BLOCK = 1 << (31 - 2 * _LIMB_BITS)
_EXPONENT_MASK = 0x7F800000
# Least scale of `sum_of_squares`: 2**11 over it is still finite.
_TINY = 2.0**-100


def sum_of_weights(x: jax.Array) -> jax.Array:
    """`f32[..., n] -> f32[...]`, the sum over the last axis of numbers from 0 to 1, of which n < 2**20.

    Each is rounded to a multiple of n 2**-30 (2**-23 for 128 of them, as fine as float32 is below 1).
    """
    size = x.shape[-1]
    if size == 1:
        return x[..., 0]
    scale = 2.0 ** (30 - (size - 1).bit_length())
    whole = (x * jnp.float32(scale) + jnp.float32(0.5)).astype(jnp.int32)
    return jnp.sum(whole, axis=-1).astype(jnp.float32) * jnp.float32(1 / scale)


def sum_of_squares(x: jax.Array) -> jax.Array:
    """`f32[..., n] -> f32[...]`, the sum of x * x over the last axis.

    Each x becomes (h + l 2**-11) p 2**-10, where p is the power of two below the largest |x|, and h and l are integers
    of 11 bits and a sign, that is, x is rounded to 2**-22 p.  A square is then h h + 2 h l 2**-11 + l l 2**-22.
    """
    top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    power = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(top, jnp.uint32) & jnp.uint32(_EXPONENT_MASK), jnp.float32
    )
    power = jnp.maximum(power, jnp.float32(_TINY))
    # Every step is exact: products with powers of two, and a difference of numbers that are close.
    half = jnp.float32(1 << (_LIMB_BITS - 1))
    scaled = x * (half / power)
    high = scaled.astype(jnp.int32)
    low = jnp.round((scaled - high.astype(jnp.float32)) * jnp.float32(1 << _LIMB_BITS)).astype(jnp.int32)
    sums = _blockwise_sums(jnp.stack([high * high, high * low, low * low], axis=-2))
    squares, crossed, small = sums[..., 0], sums[..., 1], sums[..., 2]
    total = squares + crossed * jnp.float32(2.0 ** (1 - _LIMB_BITS)) + small * jnp.float32(2.0 ** (-2 * _LIMB_BITS))
    unit = power[..., 0] / half
    return total * unit * unit


def _blockwise_sums(x: jax.Array) -> jax.Array:
    """`i32[..., n] -> f32[...]`: sums over the last axis in blocks that an i32 holds, which are then added in order."""
    size = x.shape[-1]
    blocks = -(-size // (_BLOCK - 1))
    while size % blocks:
        blocks += 1
    sums = jnp.sum(x.reshape(*x.shape[:-1], blocks, size // blocks), axis=-1).astype(jnp.float32)
    total = sums[..., 0]
    for block in range(1, blocks):
        total = total + sums[..., block]
    return total


def computed_once(x: jax.Array) -> jax.Array:
    """`x` again (f32, below 3e38), but not in every place that uses it.

    XLA copies cheap code into each of its users: a value that all layers need would be computed by each layer anew.
    What ends with a division counts as dear and is not copied; the divisor is 1, which the compiler cannot know.
    """
    return x / jnp.where(x > jnp.float32(3e38), jnp.float32(2), jnp.float32(1))
