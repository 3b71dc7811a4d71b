"""The JAX mesh of an instance."""

from collections.abc import Sequence

import jax
import numpy as np

from nitsum_jax.meshes.layout import Instance
from nitsum_jax.meshes.vshards import VshardMap

TP_AXIS = "tp"


def instance_mesh(devices: Sequence[jax.Device], instance: Instance, vmap: VshardMap) -> jax.sharding.Mesh:
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
