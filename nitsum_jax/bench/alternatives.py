"""What changing the layout costs without resident virtual shards: the ways that other systems take."""

import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.cell import Cell
from nitsum_jax.meshes.layout import InstanceSpec, Layout
from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.meshes.reshard import reshard


def memcpy_gbps(size: int) -> float:
    """Speed of a plain copy of so many bytes into memory that is warm, best of three, GB/s."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - start)
    return size / best / 1e9


def device_put_ms(cell: Cell, before: Layout, after: Layout, kv_blocks: int) -> float:
    """Everything by the general path, `meshes.reshard` (`jax.device_put`): all weights, and so many KV blocks.

    Each new instance gets the whole model, sharded over its devices, from an old instance that shares a device with
    it, and its part by TP of the KV blocks.
    """
    total = sum(spec.tp for spec in after.instances)
    arrays, shardings = [], []
    for spec in after.instances:
        old = next((o for o in before.instances if set(o.devices) & set(spec.devices)), before.instances[0])
        blocks = kv_blocks * spec.tp // total
        found = _standard_arrays(cell, old, max(blocks, 1))
        arrays += found
        shardings += [_sharding(cell, spec)] * len(found)
    jax.block_until_ready(arrays)
    start = time.perf_counter()
    jax.block_until_ready(reshard(arrays, shardings)[0])
    return 1000 * (time.perf_counter() - start)


def _sharding(cell: Cell, spec: InstanceSpec) -> NamedSharding:
    return NamedSharding(cell.geometries.of(spec.devices).mesh, PartitionSpec(TP_AXIS))


def _standard_arrays(cell: Cell, spec: InstanceSpec, blocks: int) -> list[jax.Array]:
    """Arrays as large as weights and KV blocks, one per parameter, sharded over an instance as is usual."""
    sharding = _sharding(cell, spec)
    vshards = cell.vmap.num_vshards
    shapes = {}
    for name, arrays in cell.bank.wrap(spec).items():
        rows = arrays[0].shape[0] // spec.tp * vshards  # per slot there are rows of one vshard on every rank
        if len(arrays) * spec.tp == vshards:
            shapes[name] = ((rows, *arrays[0].shape[1:]), arrays[0].dtype)
    pool = cell.program.pool
    shapes["kv"] = ((-(-blocks // vshards) * vshards, *pool.block_shape), pool.storage_dtype)
    return [jax.device_put(np.ones(shape, dtype), sharding) for shape, dtype in shapes.values()]
