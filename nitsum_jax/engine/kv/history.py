"""Token histories, and how they go along when sequences change their instance, without waiting for tokens in flight.

The host knows the tokens that it has read; those of steps still in flight stand only in the history on the devices.
A history is small (rows x longest context, 4 bytes each), so it travels whole and the wanted rows are picked there.

A row is a sequence: its tokens, then what steers the choice of the next ones (see `packing`).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nitsum_jax.engine.step.packing import STEERING

# The two parts of a row: `history[row, TOKENS]` is i32[longest context + 1], `history[row, STEERED_BY]` i32[STEERING].
TOKENS, STEERED_BY = slice(None, -STEERING), slice(-STEERING, None)


def is_ready(array: jax.Array) -> bool:
    """Whether the step that makes an array is over; does not wait."""
    return bool(array.is_ready())  # type: ignore[attr-defined]  # it is there, but not in JAX's types


class HistoryMover:
    """Copies rows of one instance's token history into another's; compiled ahead of time for every device."""

    def __init__(self, devices: Sequence[jax.Device], shape: tuple[int, int]):
        """Compiles the copies.

        Args:
          devices: of the cell.
          shape: of a history, i32[rows, columns].
        """
        self._rows = shape[0]
        self._merge: dict[jax.Device, jax.stages.Compiled] = {}
        for device in devices:
            here = jax.sharding.SingleDeviceSharding(device)
            history = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=here)
            ids = jax.ShapeDtypeStruct((shape[0],), jnp.int32, sharding=here)
            self._merge[device] = jax.jit(_merge, donate_argnums=0).lower(history, history, ids, ids).compile()

    def merge(self, history: jax.Array, source: jax.Array, rows: Sequence[tuple[int, int]]) -> jax.Array:
        """Replaces rows of a history by those of another; nothing is waited for.

        Args:
          history: i32[rows, columns], replicated over the devices of an instance; donated.
          source: likewise, of any other devices; kept.
          rows: (row of source, row of history).

        Returns:
          The new history, placed as `history` was.
        """
        there = np.zeros(self._rows, np.int32)
        here = np.full(self._rows, self._rows, np.int32)  # outside: dropped
        for index, (a, b) in enumerate(rows):
            there[index], here[index] = a, b
        by_device = {shard.device: shard.data for shard in source.addressable_shards}
        nearest = source.addressable_shards[0].data
        merged = []
        for shard in history.addressable_shards:
            part = by_device.get(shard.device)
            if part is None:
                part = jax.device_put(nearest, shard.device)
            merged.append(self._merge[shard.device](shard.data, part, there, here))
        return jax.make_array_from_single_device_arrays(history.shape, history.sharding, merged)


def _merge(history: jax.Array, source: jax.Array, there: jax.Array, here: jax.Array) -> jax.Array:
    return history.at[here].set(source[there], mode="drop")
