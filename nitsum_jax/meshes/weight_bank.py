"""Weights resident on their devices as one buffer per vshard, wrapped for any instance without a copy.

A device that keeps the vshards of its smallest TP holds those of every larger TP too (`vshards` explains why), so the
global parameter arrays of every instance can be made around buffers that are already there.
"""

import collections
import dataclasses
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.errors import PreconditionError
from nitsum_jax.meshes.host_copy import put_on_devices
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.reshard import reshard
from nitsum_jax.meshes.vshards import VshardMap

WrappedParams = dict[str, tuple[jax.Array, ...]]
Placement = tuple[str, int | None, np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True, slots=True)
class BankCounters:
    """Bytes since the bank was made, each counted once per device that they are on.

    Attributes:
      bytes_loaded: put on devices by add_cut, add_replicated and load.
      bytes_wrapped: wrapped into global arrays; a cached wrap is not counted again.
      bytes_moved: moved from device to device by fetch.
      bytes_freed: given up by drop, or replaced by adding the same buffer again.
    """

    bytes_loaded: int = 0
    bytes_wrapped: int = 0
    bytes_moved: int = 0
    bytes_freed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """What all buffers of one name have in common."""

    shape: tuple[int, ...]
    dtype: np.dtype
    replicated: bool


class WeightBank:
    """Single-device buffers of a cell: cut parameters per (name, vshard), replicated ones per name, on each device.

    Devices are given by their index in the cell.  Methods may be called from several threads.
    """

    def __init__(self, devices: Sequence[jax.Device], vmap: VshardMap) -> None:
        """Makes an empty bank.

        Args:
          devices: all devices of the cell.
          vmap: which vshards an instance needs where.
        """
        self._devices = tuple(devices)
        self._vmap = vmap
        self._forms: dict[str, _Form] = {}
        # Per device, then per name, then per vshard (None for replicated names).
        self._buffers: list[dict[str, dict[int | None, jax.Array]]] = [{} for _ in self._devices]
        self._wrapped: dict[tuple[int, ...], WrappedParams] = {}
        self._counters = BankCounters()
        self._lock = threading.RLock()

    @property
    def counters(self) -> BankCounters:
        """A snapshot of the byte counters."""
        return self._counters

    @property
    def num_devices(self) -> int:
        """Devices of the cell."""
        return len(self._devices)

    @property
    def names(self) -> tuple[str, ...]:
        """All parameter names, in the order in which they came."""
        return tuple(self._forms)

    def add_cut(self, name: str, vshard: int, device: int, value: np.ndarray | jax.Array) -> None:
        """Adds (or replaces) one vshard of a cut parameter on one device.

        Args:
          name: the parameter.
          vshard: which cut, 0 to K-1.
          device: index of the device; a `jax.Array` already on it is kept as it is, anything else is copied there.
          value: [rows, ...], the TP axis leading; every vshard of a name has the same shape and dtype.

        Raises:
          ValueError: shape, dtype, vshard or device do not fit.
        """
        self._add(name, vshard, [device], value)

    def add_replicated(self, name: str, device: int, value: np.ndarray | jax.Array) -> None:
        """Adds (or replaces) a parameter that every device of an instance holds whole; otherwise as `add_cut`."""
        self._add(name, None, [device], value)

    def load(self, placements: Iterable[Placement], residency: Mapping[int, Collection[int]]) -> None:
        """Puts a stream of host arrays on every device that must hold them.

        Each array is on its devices, and let go of, before the next one is asked for: if the stream makes them one by
        one, the host never holds more than one.

        Args:
          placements: (name, vshard or None for replicated, host array).  A vshard that no device needs is skipped.
          residency: per device the vshards it must hold; replicated parameters go to every device in it.

        Raises:
          ValueError: as `add_cut`.
        """
        for name, vshard, value in placements:
            devices = [d for d, vshards in residency.items() if vshard is None or vshard in vshards]
            self._add(name, vshard, devices, value)
            del value  # or it would live until the stream has made the next one

    def wrap(self, instance: InstanceSpec) -> WrappedParams:
        """The parameters of an instance as global arrays around the buffers that are there, without a copy.

        The result is kept and returned again for the same devices, whatever the role; treat it as read-only.

        Args:
          instance: t devices, in any layout.

        Returns:
          Per cut name K/t arrays, one for each slot j: of shape [t * rows, ...], sharded along the leading axis, whose
          shard on the device of rank r is vshard r * K/t + j.  Per replicated name one replicated array, of the shape
          of its buffers.

        Raises:
          InvalidInputError, PreconditionError: the devices cannot form an instance (see `VshardMap.check_group`).
          PreconditionError: buffers are missing; `fetch` moves them.
        """
        cached = self._wrapped.get(instance.devices)
        if cached is not None:
            return cached
        with self._lock:
            if instance.devices in self._wrapped:  # another thread was faster
                return self._wrapped[instance.devices]
            missing = self.missing(instance)
            if missing:
                name, vshard, device = missing[0]
                raise PreconditionError(
                    f"instance {instance} lacks {len(missing)} weight buffers, the first {_what(name, vshard)} on "
                    f"device {device}: fetch the instance first"
                )
            wrapped = self._wrap(instance)
            self._wrapped[instance.devices] = wrapped
            return wrapped

    def missing(self, instance: InstanceSpec) -> list[tuple[str, int | None, int]]:
        """What an instance needs and its devices lack: (name, vshard or None for replicated, device), by name.

        Raises:
          InvalidInputError, PreconditionError: the devices cannot form an instance.
        """
        with self._lock:
            needs = [(device, self._needed(device, instance.tp)) for device in self._vmap.ordered(instance.devices)]
            return [
                (name, vshard, device)
                for name, form in self._forms.items()
                for device, vshards in needs
                for vshard in ((None,) if form.replicated else vshards)
                if vshard not in self._buffers[device].get(name, {})
            ]

    def fetch(self, instance: InstanceSpec) -> int:
        """Moves what an instance lacks from devices that have it, in one transfer per pair of devices.

        The transfers are dispatched, not waited for.  Sources share the load evenly.

        Returns:
          The bytes that were moved.

        Raises:
          PreconditionError: something is on no device; nothing is moved then.
          InvalidInputError, PreconditionError: the devices cannot form an instance.
        """
        with self._lock:
            load: collections.Counter[int] = collections.Counter()
            transfers: dict[tuple[int, int], list[tuple[str, int | None]]] = {}
            for name, vshard, device in self.missing(instance):
                holders = [d for d, held in enumerate(self._buffers) if vshard in held.get(name, {})]
                if not holders:
                    raise PreconditionError(f"{_what(name, vshard)} is on no device any more: load the weights again")
                source = min(holders, key=lambda d: (load[d], d))
                load[source] += self._buffers[source][name][vshard].nbytes
                transfers.setdefault((source, device), []).append((name, vshard))
            size = 0
            for (source, device), keys in transfers.items():
                buffers = [self._buffers[source][name][vshard] for name, vshard in keys]
                placed, landed = reshard(buffers, self._devices[device])
                size += landed
                for (name, vshard), moved in zip(keys, placed, strict=True):
                    self._buffers[device].setdefault(name, {})[vshard] = moved
            self._count(bytes_moved=size)
            return size

    def fetch_some(self, instance: InstanceSpec, most: int) -> list[jax.Array]:
        """As `fetch`, but no more than the first parameters that come to `most` bytes, one at least.

        Returns:
          What is being moved, to be waited for; empty if nothing was missing.
        """
        with self._lock:
            moved: list[jax.Array] = []
            size = 0
            for name, vshard, device in self.missing(instance):
                holders = [d for d, held in enumerate(self._buffers) if vshard in held.get(name, {})]
                if not holders:
                    raise PreconditionError(f"{_what(name, vshard)} is on no device any more: load the weights again")
                if moved and size >= most:
                    break
                # Neighbours in the list go to other devices or are other vshards, so this spreads the load.
                buffer = self._buffers[holders[len(moved) % len(holders)]][name][vshard]
                copy, landed = reshard(buffer, self._devices[device])
                self._buffers[device].setdefault(name, {})[vshard] = copy
                moved.append(copy)
                size += landed
            self._count(bytes_moved=size)
            return moved

    def drop(self, device: int, vshards: Collection[int]) -> int:
        """Gives up vshards of all cut parameters on a device, and every wrap that contains them.

        The memory is free once no wrap of them is held and no step runs on it.

        Returns:
          The bytes that were given up.

        Raises:
          ValueError: there is no such device.
        """
        with self._lock:
            self._check_device(device)
            gone = [held.pop(v) for held in self._buffers[device].values() for v in vshards if v in held]
            freed = sum(buffer.nbytes for buffer in gone)
            self._forget_wraps(device, vshards)
            self._count(bytes_freed=freed)
            return freed

    def resident(self, device: int) -> frozenset[int]:
        """The vshards of which a device holds at least one parameter."""
        with self._lock:
            return frozenset(v for held in self._buffers[device].values() for v in held if v is not None)

    def bytes_resident(self, device: int) -> int:
        """The bytes of all buffers of a device."""
        with self._lock:
            return sum(buffer.nbytes for held in self._buffers[device].values() for buffer in held.values())

    def bytes_allocated(self) -> int:
        """The memory in bytes that all buffers take: emulated CPU devices share theirs, which is counted once."""
        with self._lock:
            sizes: dict[tuple[int, int], int] = {}
            for device, names in enumerate(self._buffers):
                place = -1 if self._devices[device].platform == "cpu" else device
                for held in names.values():
                    for buffer in held.values():
                        sizes[place, buffer.unsafe_buffer_pointer()] = buffer.nbytes
            return sum(sizes.values())

    def _needed(self, device: int, tp: int) -> range:
        self._check_device(device)
        return self._vmap.vshards_of(device, tp)

    def _wrap(self, instance: InstanceSpec) -> WrappedParams:
        mesh = instance_mesh(self._devices, instance, self._vmap)
        cut, whole = NamedSharding(mesh, PartitionSpec(TP_AXIS)), NamedSharding(mesh, PartitionSpec())
        ranks = self._vmap.ordered(instance.devices)
        firsts = [self._needed(device, instance.tp).start for device in ranks]
        wrapped: WrappedParams = {}
        size = 0
        for name, form in self._forms.items():
            held = [self._buffers[device][name] for device in ranks]
            if form.replicated:
                slots = [[h[None] for h in held]]
                shape, sharding = form.shape, whole
            else:
                count = self._vmap.slots(instance.tp)
                slots = [[h[first + j] for h, first in zip(held, firsts, strict=True)] for j in range(count)]
                shape, sharding = (form.shape[0] * instance.tp, *form.shape[1:]), cut
            wrapped[name] = tuple(jax.make_array_from_single_device_arrays(shape, sharding, slot) for slot in slots)
            size += len(slots) * len(ranks) * held[0][None if form.replicated else firsts[0]].nbytes
        self._count(bytes_wrapped=size)
        return wrapped

    def _add(self, name: str, vshard: int | None, devices: Sequence[int], value: np.ndarray | jax.Array) -> None:
        for device in devices:
            self._check_device(device)
        if vshard is not None and not 0 <= vshard < self._vmap.num_vshards:
            raise ValueError(f"vshard {vshard} of {name!r} is outside 0 to {self._vmap.num_vshards - 1}")
        if vshard is not None and value.ndim == 0:
            raise ValueError(f"{name!r} has no leading axis to cut")
        form = _Form(tuple(value.shape), np.dtype(value.dtype), vshard is None)
        with self._lock:
            known = self._forms.get(name, form)
            if known != form:
                raise ValueError(f"{_what(name, vshard)} is {form}, but other buffers of this name are {known}")
            if not devices:
                return
            placed = put_on_devices(value, [self._devices[device] for device in devices])
            if name not in self._forms:
                self._forms[name] = form
                self._wrapped.clear()  # they lack this name
            freed = 0
            for device, buffer in zip(devices, placed, strict=True):
                held = self._buffers[device].setdefault(name, {})
                if vshard in held:
                    freed += held[vshard].nbytes
                    self._forget_wraps(device, None if vshard is None else (vshard,))
                held[vshard] = buffer
            self._count(bytes_loaded=sum(buffer.nbytes for buffer in placed), bytes_freed=freed)

    def _forget_wraps(self, device: int, vshards: Collection[int] | None) -> None:
        """Forgets the wraps that contain any of these vshards (None: anything) of a device."""
        for devices in list(self._wrapped):
            if device in devices:
                needed = self._vmap.vshards_of(device, len(devices))
                if vshards is None or any(vshard in needed for vshard in vshards):
                    del self._wrapped[devices]

    def _check_device(self, device: int) -> None:
        if not 0 <= device < len(self._devices):
            raise ValueError(f"device {device} is outside 0 to {len(self._devices) - 1}")

    def _count(self, **increments: int) -> None:
        values = {name: getattr(self._counters, name) + value for name, value in increments.items()}
        self._counters = dataclasses.replace(self._counters, **values)


def _what(name: str, vshard: int | None) -> str:
    return f"{name!r} (replicated)" if vshard is None else f"vshard {vshard} of {name!r}"
