"""Sums whose every bit is fixed by the numbers added, whatever XLA makes of the code around them.

XLA adds up an axis in an order that depends on the size of the array and on what it fuses the sum with, and both
depend on how many virtual shards lie on a device.  Here the order is written out.  A product that is added to
something may besides be rounded or not (fused multiply-add), as the compiler likes; where that matters, products are
made exact first.
"""

import jax
import jax.numpy as jnp


def sum_last(x: jax.Array) -> jax.Array:
    """Sum over the last axis in a fixed tree; the order of XLA's own sums depends on the size of the array."""
    while x.shape[-1] > 1:
        half = (x.shape[-1] + 1) // 2
        rest = x[..., half:]
        if rest.shape[-1] < half:
            rest = jnp.pad(rest, [(0, 0)] * (x.ndim - 1) + [(0, half - rest.shape[-1])])
        x = x[..., :half] + rest
    return x[..., 0]


def sum_of_squares(x: jax.Array) -> jax.Array:
    """`f32[..., n] -> f32[...]`, the sum of x * x over the last axis.

    x = h + l, where h has the upper 12 of 24 bits.  h * h, h * l and l * l fit in 24 bits, so they are exact, and
    adding them gives the same bits with and without fused multiply-add.
    """
    high = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFF000), jnp.float32
    )
    low = x - high
    return sum_last(high * high) + (sum_last(jnp.float32(2) * high * low) + sum_last(low * low))
