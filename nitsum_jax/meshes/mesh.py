"""Where an instance lies: its devices in order of rank, the device of each vshard, its JAX mesh."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.vshards import VshardMap

TP_AXIS = "tp"


def instance_mesh(devices: Sequence[jax.Device], instance: InstanceSpec, vmap: VshardMap) -> jax.sharding.Mesh:
    """The 1-D mesh of an instance, its axis named `TP_AXIS`, its devices in order of rank.

    In this order an array cut evenly along the axis has vshards ascending from device to device.

    Args:
      devices: all devices of the cell.
      instance: which of them.
      vmap: says which rank each has.

    Raises:
      InvalidInputError, PreconditionError: the devices cannot form an instance (see `VshardMap.check_group`).
    """
    order = [devices[index] for index in vmap.ordered(instance.devices)]
    # Named, because the default of JAX has changed before.
    return jax.sharding.Mesh(np.array(order), (TP_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where an instance lies.

    Attributes:
      order: its devices, in order of rank.
      device_of: device of every vshard, which is where its blocks are.
      mesh: 1-D, of the devices in this order.
    """

    order: tuple[int, ...]
    device_of: tuple[int, ...]
    mesh: jax.sharding.Mesh


class Geometries:
    """The geometry of every instance that a cell may have, each worked out once; may be asked on any thread."""

    def __init__(self, devices: Sequence[jax.Device], vmap: VshardMap):
        """Works nothing out yet.

        Args:
          devices: all devices of the cell.
          vmap: which vshards lie where.
        """
        self._devices = devices
        self._vmap = vmap
        self._known: dict[tuple[int, ...], Geometry] = {}

    def of(self, devices: Sequence[int]) -> Geometry:
        """Of the instance on these devices, in any order; raises as `instance_mesh` does."""
        key = tuple(sorted(devices))
        found = self._known.get(key)
        if found is None:
            order = self._vmap.ordered(key)
            slots = self._vmap.slots(len(key))
            device_of = tuple(device for device in order for _ in range(slots))
            mesh = instance_mesh(self._devices, InstanceSpec(key), self._vmap)
            found = self._known.setdefault(key, Geometry(order, device_of, mesh))
        return found
