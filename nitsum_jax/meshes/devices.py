"""Finding the devices of a cell, emulating some where there is no accelerator, and asking how much memory they have."""

import jax

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.memory import host_free_bytes


def emulate_cpu_devices(n: int) -> None:
    """Makes JAX's CPU backend show n devices.  Call it before anything makes JAX start its backends.

    Harmless where there is an accelerator: that stays the default backend.

    Args:
      n: how many devices, at least 1.

    Raises:
      InvalidInputError: n is less than 1.
      PreconditionError: JAX has started already, with another number of CPU devices.
    """
    if n < 1:
        raise InvalidInputError(f"cannot emulate {n} devices: give 1 or more")
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # the backends are there already
        there = len(jax.devices("cpu"))
        if there != n:
            raise PreconditionError(
                f"JAX has already started with {there} CPU device(s), not {n}: emulate devices before JAX is first used"
            ) from None


def discover(n: int | None = None) -> tuple[jax.Device, ...]:
    """The first n devices of the default backend that this process can use.

    Args:
      n: how many devices, or None for all.

    Raises:
      InvalidInputError: n is less than 1.
      PreconditionError: there are fewer than n, or no backend starts.
    """
    if n is not None and n < 1:
        raise InvalidInputError(f"cannot run on {n} devices: give 1 or more")
    try:
        devices = jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # JAX raises either when it finds no platform it may use
        reason = " ".join(str(error).split()) or "no platform is available"
        raise PreconditionError(f"JAX finds no devices ({reason}): check drivers and JAX_PLATFORMS") from error
    if n is None:
        return tuple(devices)
    if n > len(devices):
        platform = devices[0].platform
        advice = f"use at most {len(devices)}"
        if platform == "cpu":
            advice += f", or emulate {n} before JAX starts (emulate_cpu_devices, or JAX_NUM_CPU_DEVICES={n})"
        raise PreconditionError(f"{n} devices are needed, but there are {len(devices)} ({platform}): {advice}")
    return tuple(devices[:n])


def free_bytes(device: jax.Device) -> int | None:
    """Memory in bytes that could still be allocated on a device; None where the platform does not tell.

    CPU devices, emulated or not, all answer with the free memory of the machine, which they share: divide it among
    them.
    """
    if device.platform == "cpu":
        return host_free_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(0, stats["bytes_limit"] - stats.get("bytes_in_use", 0))
