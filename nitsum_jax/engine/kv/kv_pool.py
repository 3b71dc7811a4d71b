"""The KV pool of a cell: one array per device, and the owner of each of its blocks."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.engine.kv.prefix_index import PrefixIndex
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.meshes.mesh import TP_AXIS


class BlockAllocator:
    """The users of each block of one device.

    A block has as many users as there are block tables with it.  Without a user it is free: on the stack, or *idle* if
    the prefix index knows what it holds.  Idle blocks keep their contents for as long as the stack has others to give;
    then those that have been idle longest are given.
    """

    def __init__(self, blocks: int, index: PrefixIndex | None = None, device: int = 0):
        """All blocks are free.

        Args:
          blocks: how many there are.
          index: knows the contents of blocks; None: no prefixes are shared.
          device: whose blocks they are, in the index.
        """
        self.total = blocks
        self.clock = 0  # the greater, the later blocks become idle
        self._index = index
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Makes all blocks free, and what they hold forgotten."""
        if self._index is not None:
            self._index.drop_device(self._device)
        self._users = np.zeros(self.total, np.int32)
        self._idle_since = np.zeros(self.total, np.int64)
        self._restack()

    @property
    def free(self) -> int:
        """Blocks that can be taken."""
        return self._stacked + self.idle

    def users(self, blocks: np.ndarray) -> np.ndarray:
        """i32[n]: users of each of these blocks."""
        return np.asarray(self._users[blocks])

    def state(self) -> np.ndarray:
        """What `restore` takes."""
        return self._users.copy()

    def restore(self, state: np.ndarray) -> None:
        """Goes back to the users of an earlier state; what blocks hold is forgotten."""
        if self._index is not None:
            self._index.drop_device(self._device)
        self._users = state.copy()
        self._restack()

    def take(self, count: int) -> np.ndarray:
        """Takes `count` blocks, each for one user: i32[count].

        Raises:
          ValueError: fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks asked for, {self.free} free")
        if count > self._stacked:
            self._evict(count - self._stacked)
        self._stacked -= count
        blocks = self._stack[self._stacked : self._stacked + count].copy()
        self._users[blocks] = 1
        return blocks

    def share(self, blocks: np.ndarray, more: np.ndarray | int = 1) -> None:
        """So many users more for each of these blocks, which differ and are in use or idle."""
        self.idle -= int(np.count_nonzero(self._users[blocks] == 0))
        self._users[blocks] += more

    def give(self, *parts: np.ndarray) -> None:
        """One user less for each of these blocks; of a part, whose blocks are in the order of their pages, the last are
        evicted first.
        """
        if not parts:
            return
        blocks = parts[0] if len(parts) == 1 else np.concatenate(parts)
        np.subtract.at(self._users, blocks, 1)
        left = self._users[blocks]
        if len(blocks) and left.min() < 0:
            np.add.at(self._users, blocks, 1)
            raise ValueError("more blocks given back than there are: one was given twice")
        done = blocks[left == 0]
        if self._index is not None:
            page = np.concatenate([np.arange(len(part)) for part in parts])[left == 0]
            done, first = np.unique(done, return_index=True)
            page = page[first]
            kept = self._index.holds(self._device, done)
            self._idle_since[done[kept]] = (self.clock << 20) - page[kept]
            self.idle += int(np.count_nonzero(kept))
            done = done[~kept]
        else:  # a sequence may have a block several times, see `window`
            done = done[np.sort(np.unique(done, return_index=True)[1])]
        self._push(done)

    def forget(self, blocks: np.ndarray | None = None) -> None:
        """What these blocks i32[n] (None: all) hold is not known any more."""
        if self._index is None:
            return
        idle = self._idle_blocks()
        if blocks is None:
            self._index.drop_device(self._device)
        else:
            idle = np.intersect1d(idle, blocks)
            self._index.drop(self._device, blocks)
        self.idle -= len(idle)
        self._push(idle)

    def _evict(self, count: int) -> None:
        assert self._index is not None
        idle = self._idle_blocks()
        count = min(len(idle), max(count, self.total // 64))  # looking for them takes longer than dropping some more
        oldest = idle[np.argpartition(self._idle_since[idle], count - 1)[:count]]
        self._index.drop(self._device, oldest)
        self.idle -= count
        self._push(oldest)

    def _idle_blocks(self) -> np.ndarray:
        assert self._index is not None
        free = np.flatnonzero(self._users == 0)
        return free[self._index.holds(self._device, free)].astype(np.int32)

    def _push(self, blocks: np.ndarray) -> None:
        self._stack[self._stacked : self._stacked + len(blocks)] = blocks
        self._stacked += len(blocks)

    def _restack(self) -> None:
        # Reversed, so that the first blocks are given first.
        free = np.flatnonzero(self._users == 0)[::-1].astype(np.int32)
        self._stack = np.zeros(self.total, np.int32)
        self._stacked = self.idle = 0
        self._push(free)


class KvPool:
    """One pool array and one allocator per device.

    The arrays are lent to the instances, whose steps donate them and get new ones: `lend` wraps the arrays of an
    instance's devices in one global array without a copy, and `take_back` unwraps it.
    """

    def __init__(self, devices: Sequence[jax.Device], shape: PoolShape, *, prefix_vshards: int | None = None):
        """Allocates the arrays.

        Args:
          devices: of the cell.
          shape: of one device's array.
          prefix_vshards: K, if blocks are to be found again by what they hold; None: they are not.
        """
        self.shape = shape
        self.devices = tuple(devices)
        self.index = None if prefix_vshards is None else PrefixIndex(len(devices), prefix_vshards, shape.blocks)
        self.allocators = tuple(BlockAllocator(shape.blocks, self.index, number) for number in range(len(devices)))
        self._arrays: list[jax.Array | None] = [None] * len(devices)
        for index in range(len(devices)):
            self.renew(index)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of one device's array."""
        return self.shape.blocks * self.shape.block_bytes

    def renew(self, index: int) -> None:
        """Gives a device a fresh array: at the start, or when a failed step took the old one with it."""
        self.allocators[index].forget()
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
        """The arrays of the devices `indices` (in rank order, those of `mesh`) as one array sharded along `TP_AXIS`."""
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

    def reuse(
        self, vshard: int | np.ndarray, source: int, blocks: np.ndarray, target: int, more: np.ndarray | int = 1
    ) -> np.ndarray:
        """i32[n]: blocks of `target` that hold what blocks i32[n] of `source` do, with so many users more, or -1."""
        if self.index is None:
            return np.full(len(blocks), -1, np.int32)
        twins = self.index.twins(vshard, source, blocks, target)
        found = twins >= 0
        self.allocators[target].share(twins[found], np.broadcast_to(more, found.shape)[found])
        return twins

    def copied(self, vshard: int | np.ndarray, source: int, blocks: np.ndarray, target: int, new: np.ndarray) -> None:
        """Notes that blocks i32[n] of `source`, all of one virtual shard or each of its own, are copied to `new`."""
        if self.index is not None:
            self.index.copied(vshard, source, blocks, target, new)

    def tick(self) -> None:
        """From now on blocks become idle later than before."""
        for allocator in self.allocators:
            allocator.clock += 1

    @property
    def idle(self) -> int:
        """Free blocks of all devices that still hold pages for requests to come."""
        return sum(allocator.idle for allocator in self.allocators)

    @property
    def free(self) -> int:
        """Free blocks of all devices."""
        return sum(allocator.free for allocator in self.allocators)

    @property
    def total(self) -> int:
        """Blocks of all devices."""
        return sum(allocator.total for allocator in self.allocators)
