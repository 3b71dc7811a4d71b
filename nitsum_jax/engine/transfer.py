"""Moving KV blocks between devices: gather, transfer, scatter in place, in pieces that overlap.

One piece carries whole blocks, so all layers travel together.  Pieces come in a few fixed sizes, compiled ahead of
time; together they carry exactly the blocks asked for, not one more.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.engine.kv_pool import KvPool

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


class BlockMover:
    """Compiled copies between the devices of a cell."""

    def __init__(self, pool: KvPool):
        """Compiles the copies for every device of the pool."""
        self._pool = pool
        self._gather: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._scatter: dict[tuple[int, int], jax.stages.Compiled] = {}
        shape = pool.shape
        for index, device in enumerate(pool.devices):
            here = jax.sharding.SingleDeviceSharding(device)
            whole = jax.ShapeDtypeStruct((shape.blocks, *shape.block_shape), shape.storage_dtype, sharding=here)
            for size in PIECES:
                ids = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=here)
                piece = jax.ShapeDtypeStruct((size, *shape.block_shape), shape.storage_dtype, sharding=here)
                self._gather[index, size] = jax.jit(_gather).lower(whole, ids).compile()
                scatter = jax.jit(_scatter, donate_argnums=0)
                self._scatter[index, size] = scatter.lower(whole, ids, piece).compile()

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
    # The second result can still be waited for when the first was donated to whoever uses the pool next.
    return pool.at[ids].set(piece, mode="promise_in_bounds", unique_indices=True), ids[0]
