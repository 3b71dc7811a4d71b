"""How fast this machine reads memory: the limit of every decode step, which reads all weights once."""

import time

import jax
import jax.numpy as jnp

_ROWS_BYTES = 4096 * 4


def read_bandwidth(device: jax.Device, megabytes: int, repeats: int = 8) -> float:
    """Bytes per second at which a device reads an array larger than its caches, the best of some runs.

    Two plain readers are tried, and the better counts: sums of rows, which XLA spreads over the cores, and a product
    of a matrix and a vector, which goes through the library that the model's own products use.

    Args:
      device: which one.
      megabytes: size of the array.
      repeats: runs of each reader.
    """
    rows = max(64, (megabytes << 20) // _ROWS_BYTES)
    matrix = jax.device_put(jnp.ones((rows, 4096), jnp.float32), device)
    vector = jax.device_put(jnp.ones((4096,), jnp.float32), device)
    sums = jax.jit(lambda m, v: jnp.sum(m, axis=1) + v[0])
    product = jax.jit(lambda m, v: m @ v)
    best = float("inf")
    for reader in (sums, product):
        reader(matrix, vector).block_until_ready()
        for _ in range(repeats):
            start = time.perf_counter()
            reader(matrix, vector).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return matrix.nbytes / best
