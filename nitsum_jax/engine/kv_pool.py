"""The KV pool of a cell: one array per device, and who owns which block of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.engine.attention import PoolShape
from nitsum_jax.meshes.mesh import TP_AXIS


class BlockAllocator:
    """Free blocks of one device, a stack."""

    def __init__(self, blocks: int):
        self.total = blocks
        self.reset()

    def reset(self) -> None:
        """Makes all blocks free."""
        # Reversed, so that the first blocks are given first.
        self._stack = np.arange(self.total - 1, -1, -1, dtype=np.int32)
        self.free = self.total

    def state(self) -> tuple[int, np.ndarray]:
        """What `restore` takes: all that is free, and in which order."""
        return self.free, self._stack.copy()

    def restore(self, state: tuple[int, np.ndarray]) -> None:
        """Goes back to an earlier state: what was taken since is free, what was given since is taken."""
        self.free = state[0]
        self._stack = state[1].copy()

    def take(self, count: int) -> np.ndarray:
        """Takes `count` blocks: i32[count].

        Raises:
          ValueError: fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks asked for, {self.free} free")
        self.free -= count
        return self._stack[self.free : self.free + count].copy()

    def give(self, blocks: np.ndarray) -> None:
        """Gives blocks back."""
        if self.free + len(blocks) > self.total:
            raise ValueError("more blocks given back than there are: one was given twice")
        self._stack[self.free : self.free + len(blocks)] = blocks
        self.free += len(blocks)


class KvPool:
    """One pool array and one allocator per device.

    The arrays are lent to the instances, whose steps donate them and get new ones: `lend` wraps the arrays of an
    instance's devices in one global array without a copy, and `take_back` unwraps it.
    """

    def __init__(self, devices: Sequence[jax.Device], shape: PoolShape):
        self.shape = shape
        self.devices = tuple(devices)
        self.allocators = tuple(BlockAllocator(shape.blocks) for _ in devices)
        self._arrays: list[jax.Array | None] = [None] * len(devices)
        for index in range(len(devices)):
            self.renew(index)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of one device's array."""
        return self.shape.blocks * self.shape.block_bytes

    def renew(self, index: int) -> None:
        """Gives a device a fresh array: at the start, or when a failed step took the old one with it."""
        self._arrays[index] = None  # where the pool takes most of the memory there is no room for two
        whole = (self.shape.blocks, *self.shape.block_shape)
        fresh = jnp.zeros(whole, self.shape.storage_dtype, device=self.devices[index])
        if self.devices[index].platform == "cpu":
            fresh.block_until_ready()  # `HostMover` writes to it without asking
        self._arrays[index] = fresh

    def reset(self, index: int) -> None:
        """Gives a device a fresh array and takes all its blocks back."""
        self.renew(index)
        self.allocators[index].reset()

    def lend(self, mesh: Mesh, indices: Sequence[int]) -> jax.Array:
        """The arrays of the devices `indices` (in rank order, those of `mesh`) as one array sharded along "tp"."""
        parts = []
        for index in indices:
            part = self._arrays[index]
            if part is None:
                raise ValueError(f"the pool of device {index} is lent already")
            parts.append(part)
        whole = (self.shape.blocks * len(parts), *self.shape.block_shape)
        lent = jax.make_array_from_single_device_arrays(whole, NamedSharding(mesh, PartitionSpec(TP_AXIS)), parts)
        for index in indices:
            self._arrays[index] = None
        return lent

    def take_back(self, array: jax.Array, indices: Sequence[int]) -> None:
        """Undoes `lend`; `array` is what the last step left."""
        by_device = {shard.device: shard.data for shard in array.addressable_shards}
        for index in indices:
            self._arrays[index] = by_device[self.devices[index]]

    def array(self, index: int) -> jax.Array:
        """The array of a device that is not lent."""
        part = self._arrays[index]
        if part is None:
            raise ValueError(f"the pool of device {index} is lent")
        return part

    def damaged(self, index: int) -> bool:
        """Whether a device that is not lent lost its array: a copy that was to change it failed half-way."""
        part = self._arrays[index]
        return part is not None and part.is_deleted()

    def replace(self, index: int, array: jax.Array) -> None:
        """Puts a new array in the place of one that an update donated."""
        self._arrays[index] = array

    @property
    def free(self) -> int:
        """Free blocks of all devices."""
        return sum(allocator.free for allocator in self.allocators)

    @property
    def total(self) -> int:
        """Blocks of all devices."""
        return sum(allocator.total for allocator in self.allocators)
