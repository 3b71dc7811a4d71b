"""Sums whose every bit is fixed by the numbers added, whatever XLA makes of the code around them.

XLA adds up an axis in an order that depends on the size of the array and on what it fuses the sum with, and both
depend on how many virtual shards lie on a device.  A product that is added to something may besides be rounded or not
(fused multiply-add), as the compiler likes.  There are two ways out, and a platform has the one that is cheap there:

- On a CPU the order is held: numbers from 0 on are added by `max(a + |b|, floor)` with a floor that no sum is below.
  That is the same as a + b, but XLA takes it for no sum: it neither regroups it nor vectorises it, since no rule says
  that (a + |b|) + |c| may be had in another way with a maximum between.  What is added is never a product that would
  have to be rounded, so multiplying and adding in one go changes nothing either.  So every bit follows from IEEE 754.
  The numbers lie in rows of 32 at least: first the rows are added up, then what is left, in one loop for the compiler.
- Elsewhere the numbers are brought to integers first, where neither order nor grouping can change a result.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# XLA:CPU cuts longer axes in windows of this length before it reduces them, in a loop of its own.
_WINDOW = 32
# Upper half of the bits of a float32's significand, with sign and exponent.
_UPPER_HALF = 0xFFFFF000
# Bits of each of the two integers that a number becomes in `sum_of_squares`.
_LIMB_BITS = 11
# So many products of two such integers fit in an i32.
_BLOCK = 1 << (31 - 2 * _LIMB_BITS)
_EXPONENT_MASK = 0x7F800000
# Least scale of `sum_of_squares`: 2**11 over it is still finite.
_TINY = 2.0**-100


def sum_of_weights(x: jax.Array) -> jax.Array:
    """`f32[..., n] -> f32[...]`, the sum over the last axis of numbers from 0 to 1, of which n < 2**20.

    The numbers may be products with powers of two, which are exact, but of no other kind.  By integers each is rounded
    to a multiple of n 2**-30 (2**-23 for 128 of them, as fine as float32 is below 1).
    """
    if x.shape[-1] == 1:
        return x[..., 0]
    return jax.lax.platform_dependent(x, cpu=_sum_in_order, default=_weights_by_integers)


def sum_of_squares(x: jax.Array) -> jax.Array:
    """`f32[..., n] -> f32[...]`, the sum of x * x over the last axis; on a CPU, numbers below 1e-12 lose digits.

    That is far below what a norm adds to it, its epsilon.
    """
    return jax.lax.platform_dependent(x, cpu=_squares_in_order, default=_squares_by_integers)


def largest(x: jax.Array) -> jax.Array:
    """`[..., n] -> [...]`, the largest number of the last axis, on a CPU in fewer loops than `jnp.max` takes.

    Where a NaN is among them, anything may come out.
    """
    return jax.lax.platform_dependent(x, cpu=_largest_in_rows, default=lambda x: jnp.max(x, axis=-1))


def _reduced(x: jax.Array, nothing: float, combine: Callable[[int], Callable[..., jax.Array]]) -> jax.Array:
    """`[..., n] -> [...]`: rows, then what is left of them, by `combine(level)`.

    No level may have the function of another, or XLA takes two levels together, and then cuts them in windows.
    """
    start, level = x.dtype.type(nothing), 0
    while (size := x.shape[-1]) > _WINDOW:
        length = max(_WINDOW, -(-size // _WINDOW))
        rows = -(-size // length)
        if rows * length != size:
            missing = [(0, 0)] * (x.ndim - 1) + [(0, rows * length - size)]
            x = jnp.pad(x, missing, constant_values=start)
        x = jax.lax.reduce(x.reshape(*x.shape[:-1], rows, length), start, combine(level), (x.ndim - 1,))
        level += 1
    return jax.lax.reduce(x, start, combine(level), (x.ndim - 1,))


def _sum_in_order(x: jax.Array) -> jax.Array:
    def combine(level: int) -> Callable[..., jax.Array]:
        return lambda a, b: jax.lax.max(jax.lax.add(a, jax.lax.abs(b)), np.float32(-level))

    return _reduced(x, 0.0, combine)


def _largest_in_rows(x: jax.Array) -> jax.Array:
    def combine(level: int) -> Callable[..., jax.Array]:
        return jax.lax.max if level % 2 == 0 else lambda a, b: jax.lax.select(jax.lax.gt(b, a), b, a)

    lowest = -np.inf if jnp.issubdtype(x.dtype, jnp.floating) else np.iinfo(x.dtype).min
    return _reduced(x, lowest, combine)


def _squares_in_order(x: jax.Array) -> jax.Array:
    return _sum_in_order(_square(x))


def _square(x: jax.Array) -> jax.Array:
    # x = high + low, each of 12 significant bits: the three products are exact, and their sum is rounded in one way
    # whether a product goes into an addition on its own or not.  (What underflows on the way does not reach the sum
    # of a norm.)
    high = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(_UPPER_HALF), jnp.float32
    )
    low = x - high
    return high * high + (jnp.float32(2) * high * low + low * low)


def _weights_by_integers(x: jax.Array) -> jax.Array:
    size = x.shape[-1]
    scale = 2.0 ** (30 - (size - 1).bit_length())
    whole = (x * jnp.float32(scale) + jnp.float32(0.5)).astype(jnp.int32)
    return jnp.sum(whole, axis=-1).astype(jnp.float32) * jnp.float32(1 / scale)


def _squares_by_integers(x: jax.Array) -> jax.Array:
    """`sum_of_squares` of integers.

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
