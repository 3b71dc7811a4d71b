"""One compilation for all groups of equal devices.

XLA binds an executable to the devices that it was compiled for, and JAX's persistent cache keeps one entry per group.
The groups of a cell are alike, so here an executable is serialised once and loaded again with another assignment of
devices.  This needs internals of JAX; `can_rebind` tries it on a tiny program of the same kind first, and where it
does not work every group is compiled for itself.
"""

import contextlib
import functools
import io
import logging
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.meshes.mesh import TP_AXIS

_LOG = logging.getLogger(__name__)


class Blueprint:
    """A compiled step that can be loaded for other groups of devices of the same size."""

    def __init__(self, compiled: jax.stages.Compiled, devices: Sequence[jax.Device]):
        """Serialises an executable that was compiled for `devices` (in mesh order)."""
        self._data, self._in_tree, self._out_tree = serialize_executable.serialize(compiled)
        self._ids = tuple(device.id for device in devices)

    def load(self, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
        """The same executable for other devices, as many and of the same kind."""
        unpickler = _unpickler(self._data, self._ids, tuple(devices))
        executable, arguments, no_kwargs = unpickler.load()
        return jax.stages.Compiled(
            executable.load(), [], self._in_tree.unflatten(arguments), self._out_tree, no_kwargs=no_kwargs
        )


@contextlib.contextmanager
def without_jax_cache() -> Iterator[str]:
    """Compiles on this thread pass by JAX's persistent cache: on a CPU, what comes out of it cannot be serialised.

    Yields:
      A name that no function had before.  JAX decides once per process whether it looks into its cache, so a program
      is sure not to be found there only if it bears such a name.
    """
    from jax._src import config

    with config.enable_compilation_cache(False), config.persistent_cache_min_compile_time_secs(float("inf")):
        yield f"step_{uuid.uuid4().hex}"


@functools.cache
def can_rebind(first: jax.Device, second: jax.Device) -> bool:
    """Whether an executable for one of these devices can be loaded for the other, found out by doing it."""
    if first.platform == "tpu":
        return False  # an executable of a TPU is laid out for its place in the topology
    try:
        array = _probe(first, first)
        return bool(np.array_equal(array, _probe(first, second)))
    except Exception as error:  # internals of JAX have moved, or the platform refuses
        _LOG.info("executables are compiled per device group: %s", error)
        return False


def _probe(first: jax.Device, second: jax.Device) -> np.ndarray:
    spec = PartitionSpec(TP_AXIS)
    mesh = Mesh(np.array([first]), (TP_AXIS,))
    mapped = jax.shard_map(lambda x: x * jnp.float32(2), mesh=mesh, in_specs=spec, out_specs=spec)
    shape = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=NamedSharding(mesh, spec))
    with without_jax_cache() as name:
        mapped.__name__ = name
        compiled = jax.jit(mapped, donate_argnums=0).lower(shape).compile()
    loaded = Blueprint(compiled, [first]).load([second])
    there = NamedSharding(Mesh(np.array([second]), (TP_AXIS,)), spec)
    result = loaded(jax.device_put(np.arange(4, dtype=np.float32), there))
    if result.devices() != {second}:
        raise RuntimeError(f"a program loaded for {second} ran on {result.devices()}")
    return np.asarray(result)


def _unpickler(data: bytes, before: tuple[int, ...], after: tuple[jax.Device, ...]) -> Any:
    from jax._src import compiler

    class Unpickler(serialize_executable._JaxPjrtUnpickler):
        """Puts devices `after` where the executable has those with the ids `before`."""

        def __init__(self) -> None:
            super().__init__(io.BytesIO(data), after[0].client, list(after))
            self.devices_by_id = dict(zip(before, after, strict=True))

        def persistent_load(self, pid: tuple[Any, ...]) -> Any:
            if pid[0] != "exec":
                return super().persistent_load(pid)
            options = compiler.get_compile_options(
                num_replicas=1,
                num_partitions=len(after),
                device_assignment=np.array([[device.id for device in after]]),
            )
            return self.backend.deserialize_executable(
                pid[1], executable_devices=self.execution_devices, compile_options=options
            )

    return Unpickler()
