"""Putting a host array on devices, never aliased to memory that the caller may write."""

from collections.abc import Sequence

import jax
import numpy as np

_ALIGNMENT = 64  # bytes; what XLA's CPU backend asks of a buffer that it takes over as it is


def put_on_devices(value: np.ndarray | jax.Array, devices: Sequence[jax.Device]) -> list[jax.Array]:
    """One single-device array per device, each with the values of `value`; returns when all are there.

    A `jax.Array` that is on a device already is used as it is.  A numpy array is copied always: JAX's CPU backend may
    otherwise take a well-aligned one over, even where told not to, and with it everything the array is a view of and
    every later write to it.  CPU devices (emulated ones) are one memory, and so they share that one copy.

    Args:
      value: an array of any shape and of a dtype that JAX keeps.
      devices: one or more devices.

    Raises:
      ValueError: JAX would change the dtype (64-bit values while x64 is off).
    """
    source = value
    if isinstance(value, np.ndarray):
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            raise ValueError(f"JAX holds no {value.dtype} while jax_enable_x64 is off: convert it first")
        if any(device.platform == "cpu" for device in devices):
            source = _aligned_copy(value)
    return jax.block_until_ready([jax.device_put(source, device) for device in devices])


def _aligned_copy(value: np.ndarray) -> np.ndarray:
    memory = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    copy[...] = value
    copy.flags.writeable = False  # the devices own it from here on
    return copy
