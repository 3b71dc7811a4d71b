"""Moving KV blocks between devices, each with all its layers.

`BlockMover` does it with programs that queue behind the steps in flight: gather, transfer, scatter in place, in pieces
that overlap.  Pieces come in a few fixed sizes, compiled ahead of time; together they carry exactly the blocks asked
for, not one more.

`HostMover` is for emulated devices, which share the memory of the host: there a block is copied once, from where it is
to where it must be, at once and at the speed of memcpy.
"""

import ctypes
import dataclasses
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.engine.kv.kv_pool import KvPool

PIECES = (16, 4, 1)


@dataclasses.dataclass(frozen=True)
class Copy:
    """A copy that was started.

    Attributes:
      bytes: how much it moves.
      done: a small array that is ready when the copy is, i32[], or None if nothing moves.
    """

    bytes: int
    done: jax.Array | None


class Mover(Protocol):
    """Copies blocks between devices whose pools are not lent."""

    def move(self, source: int, target: int, old: np.ndarray, new: np.ndarray) -> Copy:
        """Copies blocks `old`, i32[n], of device `source` to blocks `new` of device `target`."""

    def settle(self, devices: Iterable[int]) -> None:
        """What was launched on these devices has come so far that `move` may be called; their pools are not lent."""

    def place(self, device: int) -> int:
        """A number that changes if the pool of a device moves, and copies into it may have been left behind."""


class BlockMover:
    """Compiled copies between the devices of a cell."""

    def __init__(self, pool: KvPool):
        """Compiles the copies for every device of the pool."""
        self._pool = pool
        self._gather: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._scatter: dict[tuple[int, int], jax.stages.Compiled] = {}
        shape = pool.shape
        slices = pool.devices[0].platform == "cpu"
        gather, scatter = (_gather_slices, _scatter_slices) if slices else (_gather, _scatter)
        for index, device in enumerate(pool.devices):
            here = jax.sharding.SingleDeviceSharding(device)
            whole = jax.ShapeDtypeStruct((shape.blocks, *shape.block_shape), shape.storage_dtype, sharding=here)
            for size in PIECES:
                ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=here)
                piece = jax.ShapeDtypeStruct((size, *shape.block_shape), shape.storage_dtype, sharding=here)
                self._gather[index, size] = jax.jit(gather).lower(whole, ids).compile()
                in_place = jax.jit(scatter, donate_argnums=0)
                self._scatter[index, size] = in_place.lower(whole, ids, piece).compile()

    def move(self, source: int, target: int, old: np.ndarray, new: np.ndarray) -> Copy:
        """Copies blocks `old` of device `source` to blocks `new` of device `target`.

        Neither pool may be lent.  Nothing is waited for: what uses the pools next runs behind it.

        Returns:
          The copy under way.
        """
        done = 0
        flag = None
        for size in pieces(len(old)):
            part = slice(done, done + size)
            done += size
            piece = self._gather[source, size](self._pool.array(source), old[part])
            piece = jax.device_put(piece, self._pool.devices[target])
            changed, flag = self._scatter[target, size](self._pool.array(target), new[part], piece)
            self._pool.replace(target, changed)
        return Copy(len(old) * self._pool.shape.block_bytes, flag)

    def settle(self, devices: Iterable[int]) -> None:
        """Copies queue behind all that was launched before."""

    def place(self, device: int) -> int:
        """Copies queue behind the steps and go wherever those put the pool."""
        del device
        return 0


class HostMover:
    """Copies within the memory of the host.

    They wait for nothing and go past the queues of the devices.  Whoever calls this must know that no step in flight
    writes the old blocks or touches the new ones; steps may use other blocks of the same pools meanwhile, because they
    update them in place.
    """

    def __init__(self, pool: KvPool):
        self._pool = pool

    def move(self, source: int, target: int, old: np.ndarray, new: np.ndarray) -> Copy:
        """Copies blocks, and is done."""
        here, there = self._blocks(source), self._blocks(target)
        for a, b in zip(old.tolist(), new.tolist(), strict=True):
            there[b] = here[a]
        return Copy(len(old) * self._pool.shape.block_bytes, None)

    def settle(self, devices: Iterable[int]) -> None:
        """Waits for the copies of a `BlockMover`, which are not read: the steps before a switch have been."""
        jax.block_until_ready([self._pool.array(device) for device in devices])

    def place(self, device: int) -> int:
        """Its address."""
        return int(self._pool.array(device).unsafe_buffer_pointer())

    def _blocks(self, device: int) -> np.ndarray:
        """u8[N, bytes of a block], the pool's own memory.

        A plain view by address: one that JAX gives would hold the array, so that no step could update it in place.
        """
        shape = self._pool.shape
        memory = ctypes.cast(self.place(device), ctypes.POINTER(ctypes.c_uint8))
        return np.ctypeslib.as_array(memory, (shape.blocks, shape.block_bytes))


def pieces(count: int) -> list[int]:
    """Piece sizes that add up to `count`, largest first."""
    sizes = []
    for size in PIECES:
        sizes += [size] * (count // size)
        count %= size
    return sizes


def _gather(pool: jax.Array, ids: jax.Array) -> jax.Array:
    return pool.at[ids].get(mode="promise_in_bounds")


def _scatter(pool: jax.Array, ids: jax.Array, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The second result can still be waited for when the first was donated to the next user of the pool.
    return pool.at[ids].set(piece, mode="promise_in_bounds", unique_indices=True), ids[0]


# XLA:CPU turns the two above into element-wise loops, 3 GB/s on a machine whose memcpy does 12.  One slice per block is
# a plain copy, 5 to 6 GB/s.  A GPU would launch a kernel per block.


def _gather_slices(pool: jax.Array, ids: jax.Array) -> jax.Array:
    flat = pool.reshape(pool.shape[0], -1)

    def copy(index: jax.Array, piece: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(flat, ids[index], 1)
        return jax.lax.dynamic_update_slice_in_dim(piece, block, index, 0)

    piece = jnp.zeros((ids.shape[0], flat.shape[1]), pool.dtype)
    return jax.lax.fori_loop(0, ids.shape[0], copy, piece).reshape(-1, *pool.shape[1:])


def _scatter_slices(pool: jax.Array, ids: jax.Array, piece: jax.Array) -> tuple[jax.Array, jax.Array]:
    rows = piece.reshape(piece.shape[0], -1)

    def copy(index: jax.Array, flat: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(rows, index, 1)
        return jax.lax.dynamic_update_slice_in_dim(flat, block, ids[index], 0)

    flat = jax.lax.fori_loop(0, ids.shape[0], copy, pool.reshape(pool.shape[0], -1))
    return flat.reshape(pool.shape), ids[0]
