"""How busy each instance is, for people who look at the cell."""

import dataclasses
from collections.abc import Sequence

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.kv_pool import KvPool


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceLoad:
    """A look at one instance.

    Attributes:
      devices: indices in the cell.
      tp: its tensor parallelism.
      role: what it does.
      running: sequences that it works on.
      kv_use: share of the KV blocks of its devices that are in use, 0 to 1.
    """

    devices: tuple[int, ...]
    tp: int
    role: str
    running: int
    kv_use: float


def instance_loads(instances: Sequence[Instance], pool: KvPool) -> tuple[InstanceLoad, ...]:
    """Reads counters that the engine's thread writes; each is right by itself, together they may be a step apart."""
    loads = []
    for instance in instances:
        allocators = [pool.allocators[device] for device in instance.spec.devices]
        total = sum(allocator.total for allocator in allocators)
        used = total - sum(allocator.free for allocator in allocators)
        spec = instance.spec
        loads.append(InstanceLoad(spec.devices, spec.tp, str(spec.role), len(instance.rows), used / total))
    return tuple(loads)
