"""How the decoder's parameters are made, with the annotation of how ranks share them."""

import jax
import jax.numpy as jnp
from flax import nnx

from nitsum_jax.meshes.mesh import TP_AXIS


class Initializer:
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

    def cut_ones(self, rows: int) -> nnx.List:
        """One `f32[rows]` scale of a norm per slot."""
        return self.cut_bias(rows)

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
