"""What it takes to move KV blocks between two devices, and weights by a general resharding."""

import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from nitsum_jax.bench.alternatives import device_put_ms
from nitsum_jax.engine.cell import Cell
from nitsum_jax.meshes.layout import parse_layout

_BLOCKS = 64


def link(cell: Cell, rounds: int) -> tuple[float, float]:
    """(bytes/s, seconds before the first byte) of the engine's block copies from device 0 to the next.

    From the times of one block and of as many as fit, 64 at most; of a single device, to itself.
    """
    target = min(1, len(cell.devices) - 1)
    count = min(_BLOCKS, cell.pool.shape.blocks // 2)

    def seconds(blocks: int) -> float:
        old, new = np.arange(blocks, dtype=np.int32), np.arange(blocks, dtype=np.int32) + blocks
        start = time.perf_counter()
        copy = cell.mover.move(0, target, old, new)
        jax.block_until_ready(copy.done)
        return time.perf_counter() - start

    one, many = _median(lambda: seconds(1), rounds), _median(lambda: seconds(count), rounds)
    size = cell.pool.shape.block_bytes
    rate = (count - 1) * size / max(many - one, 1e-9)
    if not one < many:  # copies too small to tell apart from their overhead
        rate = count * size / many
    return rate, max(one - size / rate, 0.0)


def resharding(cell: Cell, low: int, high: int, weight_bytes: int) -> float:
    """Bytes/s of `jax.device_put` taking all weights from an instance of one TP to one of another.

    Of a single TP: from the host to its device.
    """
    if low == high:
        host = np.ones(min(weight_bytes, 1 << 28), np.uint8)

        def put() -> float:
            start = time.perf_counter()
            jax.block_until_ready(jax.device_put(host, cell.devices[-1]))
            return time.perf_counter() - start

        return host.nbytes / _median(put, 3)
    before, after = (parse_layout(f"tp{tp}", len(cell.devices)) for tp in (low, high))
    return weight_bytes / min(device_put_ms(cell, before, after, 1) / 1000 for _ in range(2))


def _median(measure: Callable[[], float], rounds: int) -> float:
    measure()
    return statistics.median(measure() for _ in range(rounds))
