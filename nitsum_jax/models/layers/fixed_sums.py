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
# Bits of each of the three integers that a number becomes in `sum_of_squares`.
_LIMB_BITS = 8
# So many sums of products of such integers fit in an i32.
_BLOCK = 1 << 14
_EXPONENT_MASK = 0x7F800000
_EXPONENT_BIT = 23
_EXPONENT_ZERO = 127
# Least exponent of a scale in `sum_of_squares`, with the bias of a float32: 2**8 over it is still finite.
_TINY = 27


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
    return jax.lax.platform_dependent(x, cpu=_squares_in_order, default=squares_by_integers)


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


def squares_by_integers(x: jax.Array) -> jax.Array:
    """`sum_of_squares` of integers.

    Each x becomes (h + m 2**-8 + l 2**-16) p 2**-7, where p is the power of two below the largest |x|, and h, m and l
    are integers of 8 bits and a sign: x is rounded to 2**-24 p.  A square is then h h + 2 h m 2**-8 +
    (2 h l + m m) 2**-16 + (2 m l + l l 2**-8) 2**-24, the last of which is taken without its fraction.
    """
    # The largest exponent as an integer: among floats a NaN may get lost.
    exponents = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(_EXPONENT_MASK)
    exponent = jnp.maximum(jnp.max(exponents, axis=-1), jnp.int32(_TINY << _EXPONENT_BIT))

    def power_of_two(bits: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    # Exponents are added and subtracted as integers: a division would not be fused with what it scales.
    head = (_LIMB_BITS - 1) << _EXPONENT_BIT
    inverse = power_of_two(jnp.int32(2 * _EXPONENT_ZERO << _EXPONENT_BIT) - exponent + jnp.int32(head))
    # An infinity where a number is broken, so that this cannot pass for a sum.
    broken = exponent == jnp.int32(_EXPONENT_MASK)
    unit = jnp.where(broken, jnp.float32(jnp.inf), power_of_two(exponent - jnp.int32(head)))
    # Every step is exact: products with powers of two, and differences of numbers that are close.
    limb = jnp.float32(1 << _LIMB_BITS)
    scaled = x * inverse[..., None]
    high = jnp.round(scaled)
    scaled = (scaled - high) * limb
    middle = jnp.round(scaled)
    low = jnp.round((scaled - middle) * limb)
    high, middle, low = (part.astype(jnp.int32) for part in (high, middle, low))
    crossed = 2 * high * low + middle * middle
    small = 2 * middle * low + ((low * low) >> _LIMB_BITS)
    parts = (high * high, high * middle, crossed, small)
    weights = (1.0, 2.0 ** (1 - _LIMB_BITS), 2.0 ** (-2 * _LIMB_BITS), 2.0 ** (-3 * _LIMB_BITS))
    # Sums apart, not one of a stack: then XLA makes them in one go, and writes no products.
    first, *rest = (_blockwise_sum(part) * jnp.float32(weight) for part, weight in zip(parts, weights, strict=True))
    for part in rest:
        first = first + part
    return first * unit * unit


def _blockwise_sum(x: jax.Array) -> jax.Array:
    """`i32[..., n] -> f32[...]`: the sum over the last axis, in blocks that an i32 holds, which are added in order."""
    size = x.shape[-1]
    total = jnp.sum(x[..., :_BLOCK], axis=-1).astype(jnp.float32)
    for start in range(_BLOCK, size, _BLOCK):
        total = total + jnp.sum(x[..., start : start + _BLOCK], axis=-1).astype(jnp.float32)
    return total


def computed_once(x: jax.Array) -> jax.Array:
    """`x` again (f32, below 3e38), but not in every place that uses it.

    XLA copies cheap code into each of its users: a value that all layers need would be computed by each layer anew.
    What ends with a division counts as dear and is not copied; the divisor is 1, which the compiler cannot know.
    """
    return x / jnp.where(x > jnp.float32(3e38), jnp.float32(2), jnp.float32(1))
