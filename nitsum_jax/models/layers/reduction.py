"""The one order in which partial results of virtual shards are added.

Floating-point addition is not associative, so a sum split over devices usually rounds differently for every degree of
tensor parallelism.  Here the K virtual shards are always the leaves of one balanced binary tree.  A device adds up the
subtree of its own shards, then the devices' sums are added up the rest of the way.  Every degree adds the same numbers
in the same order.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from nitsum_jax.meshes.mesh import TP_AXIS

# Up to this many bytes a device fetches everyone's partial and adds them itself: one round of messages.  Above, each
# device adds up one part of the rows and the parts are exchanged, which moves 2 instead of `size` times the bytes.  So
# for devices that share a memory.
GATHER_LIMIT_BYTES = 1 << 20


def tree_sum(parts: Sequence[jax.Array]) -> jax.Array:
    """Adds a power-of-two number of arrays of one shape in a balanced binary tree, neighbours first."""
    level = list(parts)
    while len(level) > 1:
        level = [left + right for left, right in zip(level[::2], level[1::2], strict=True)]
    return level[0]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The tensor-parallel ranks that run a step together.

    Attributes:
      size: how many devices, a power of two.
      axis: the mesh axis they lie on; unused when size is 1.
      fast: add up in bfloat16 and in whatever order the devices like: a fraction of the bytes, and other bits at every
        degree of tensor parallelism.
      gather_limit_bytes: partial results of at most this size are fetched whole by every rank; the bits are the same.
    """

    size: int = 1
    axis: str = TP_AXIS
    fast: bool = False
    gather_limit_bytes: int = GATHER_LIMIT_BYTES

    @property
    def exactly(self) -> "Ranks":
        """The same ranks, which add up in one order."""
        return dataclasses.replace(self, fast=False)

    def index(self) -> jax.Array:
        """This device's rank, i32[]."""
        if self.size == 1:
            return jnp.int32(0)
        return jax.lax.axis_index(self.axis).astype(jnp.int32)

    def sum(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Sum over this device's `parts` and then over all ranks, as one tree; every rank gets the same bits.

        With `fast` that tree is the device's own only.
        """
        local = tree_sum(parts)
        if self.size == 1:
            return local
        if self.fast:
            return jax.lax.psum(local.astype(jnp.bfloat16), self.axis).astype(local.dtype)
        rows = local.size // local.shape[-1]
        if local.size * local.dtype.itemsize > self.gather_limit_bytes and rows % self.size == 0:
            split = local.reshape(self.size, rows // self.size, local.shape[-1])
            mine = jax.lax.all_to_all(split, self.axis, split_axis=0, concat_axis=0)
            part = tree_sum([mine[rank] for rank in range(self.size)])
            return jax.lax.all_gather(part, self.axis).reshape(local.shape)
        gathered = jax.lax.all_gather(local, self.axis)
        return tree_sum([gathered[rank] for rank in range(self.size)])

    def concat_last(self, local: jax.Array) -> jax.Array:
        """`[..., n] -> [..., size * n]`: the ranks' pieces side by side, in rank order."""
        if self.size == 1:
            return local
        return jax.lax.all_gather(local, self.axis, axis=local.ndim - 1, tiled=True)
