"""Elementary functions whose bits do not depend on the size of the array.

Those of XLA:CPU give other bits in a large array than in a small one, because one loop is vectorised and the other is
not.  How large the arrays of a device are depends on the layout.  These are made of operations that are rounded alike
everywhere.
"""

import math

import jax
import jax.numpy as jnp


def exp_nonpositive(x: jax.Array) -> jax.Array:
    """e**x for x <= 0 (-inf included) within 2 units in the last place; below -87 it is 0.

    Cody-Waite reduction and the polynomial of Cephes' expf.
    """
    bounded = jnp.maximum(x, jnp.float32(-87.0))
    power = jnp.floor(bounded * jnp.float32(1.44269504088896341) + jnp.float32(0.5))
    r = bounded - power * jnp.float32(0.693359375) - power * jnp.float32(-2.12194440e-4)
    y = jnp.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = y * r + jnp.float32(coefficient)
    y = y * (r * r) + r + jnp.float32(1)
    scale = jax.lax.bitcast_convert_type((power.astype(jnp.int32) + 127) << 23, jnp.float32)
    return jnp.where(x < -87, jnp.float32(0), y * scale)


def tanh(x: jax.Array) -> jax.Array:
    """Hyperbolic tangent, to 2e-7."""
    decayed = exp_nonpositive(jnp.float32(-2) * jnp.abs(x))
    return jnp.sign(x) * ((jnp.float32(1) - decayed) / (jnp.float32(1) + decayed))


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Numbers bent to lie between minus and plus `cap`; None: as they are."""
    return x if cap is None else jnp.float32(cap) * tanh(x * jnp.float32(1 / cap))


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The Gaussian error linear unit (arXiv 1606.08415) by its approximation with tanh."""
    inner = jnp.float32(math.sqrt(2 / math.pi)) * (x + jnp.float32(0.044715) * x * x * x)
    return jnp.float32(0.5) * x * (jnp.float32(1) + tanh(inner))
