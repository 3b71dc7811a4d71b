"""Which devices of a cell share fast links."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Protocol

from nitsum_jax.errors import InvalidInputError


class DeviceLike(Protocol):
    """What of a `jax.Device` says where it is; `slice_index` and `coords` are asked for and may be missing."""

    @property
    def platform(self) -> str:
        """Such as cpu, gpu or tpu."""

    @property
    def process_index(self) -> int:
        """Which process drives the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """The islands of a cell: within one, links are fast; between two, they are slow.

    Attributes:
      islands: each the ascending indices of its devices; ordered by their first device.

    Raises:
      InvalidInputError: the islands are no partition of 0 to N-1.
    """

    islands: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        devices = sorted(device for island in self.islands for device in island)
        if not devices or devices != list(range(len(devices))) or not all(self.islands):
            raise InvalidInputError(
                f"islands {self.islands} do not hold every device exactly once: list each, from 0 on"
            )
        object.__setattr__(self, "islands", tuple(sorted(tuple(sorted(island)) for island in self.islands)))

    @classmethod
    def of(cls, devices: Sequence[DeviceLike]) -> "Topology":
        """Finds the islands of a cell from what the devices tell about themselves.

        GPU: a node (slice) is an island.  TPU: chips of a slice that are connected, neighbour by neighbour, through the
        devices of the cell.  CPU: all devices are one island.

        Args:
          devices: the cell's devices, at least one; indices in the result are positions in this sequence.
        """
        groups: dict[Hashable, list[int]] = {}
        for index, device in enumerate(devices):
            groups.setdefault(_node(device), []).append(index)
        islands: list[tuple[int, ...]] = []
        for group in groups.values():
            if all(hasattr(devices[index], "coords") for index in group):
                islands += _connected(group, {index: tuple(getattr(devices[index], "coords")) for index in group})  # noqa: B009
            else:
                islands.append(tuple(group))
        return cls(tuple(islands))

    @property
    def num_devices(self) -> int:
        """How many devices the cell has."""
        return sum(map(len, self.islands))

    def island_of(self, device: int) -> int:
        """The index of the island that a device is on; raises ValueError where there is no such device."""
        for index, island in enumerate(self.islands):
            if device in island:
                return index
        raise ValueError(f"device {device} is outside 0 to {self.num_devices - 1}")

    def span(self, devices: Sequence[int]) -> int:
        """Over how many islands a group of devices is spread; 1 means fast links only."""
        return len({self.island_of(device) for device in devices})


def _node(device: DeviceLike) -> Hashable:
    if device.platform == "cpu":
        return "cpu"
    slice_index = getattr(device, "slice_index", None)
    # One process per device is a common way to drive GPUs, so the slice says more than the process where it is known.
    return ("process", device.process_index) if slice_index is None else ("slice", slice_index)


def _connected(group: Sequence[int], coords: dict[int, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The connected parts of a grid; devices on the same place (cores of one chip) are connected too."""
    islands = []
    left = set(group)
    while left:
        island = [left.pop()]
        for index in island:  # grows as it goes
            near = {i for i in left if sum(abs(a - b) for a, b in zip(coords[index], coords[i], strict=True)) <= 1}
            left -= near
            island += near
        islands.append(tuple(sorted(island)))
    return islands
