"""Islands of fast links, as devices of each platform show them."""

import dataclasses

import jax
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.topology import Topology


@dataclasses.dataclass(frozen=True)
class Gpu:
    platform: str = "gpu"
    process_index: int = 0
    slice_index: int | None = None


@dataclasses.dataclass(frozen=True)
class Tpu:
    coords: tuple[int, ...]
    slice_index: int = 0
    platform: str = "tpu"
    process_index: int = 0


def test_emulated_devices_are_one_island() -> None:
    devices = jax.devices()
    assert Topology.of(devices).islands == (tuple(range(len(devices))),)


def test_a_node_of_gpus_is_an_island() -> None:
    assert Topology.of([Gpu(), Gpu()]).islands == ((0, 1),)
    by_process = [Gpu(process_index=1), Gpu(process_index=0), Gpu(process_index=1)]
    assert Topology.of(by_process).islands == ((0, 2), (1,))
    # One process per GPU: the slice says who shares a node.
    by_slice = [Gpu(process_index=i, slice_index=i // 2) for i in range(4)]
    assert Topology.of(by_slice).islands == ((0, 1), (2, 3))


def test_connected_chips_of_a_tpu_slice_are_an_island() -> None:
    grid = [Tpu((x, y, 0)) for y in range(2) for x in range(4)]
    assert Topology.of(grid).islands == (tuple(range(8)),)
    corners = [Tpu((0, 0, 0)), Tpu((3, 0, 0)), Tpu((1, 0, 0)), Tpu((1, 1, 0)), Tpu((3, 0, 1))]
    assert Topology.of(corners).islands == ((0, 2, 3), (1, 4))
    assert Topology.of([Tpu((0, 0, 0)), Tpu((0, 0, 0))]).islands == ((0, 1),)  # two cores of a chip
    assert Topology.of([Tpu((0, 0, 0), 0), Tpu((0, 0, 0), 1)]).islands == ((0,), (1,))


def test_islands_are_kept_in_order() -> None:
    topology = Topology(((3, 2), (1, 0)))
    assert topology == Topology(((0, 1), (2, 3)))
    assert topology.num_devices == 4
    assert [topology.island_of(device) for device in range(4)] == [0, 0, 1, 1]
    assert topology.span((0, 1)) == 1
    assert topology.span((1, 2)) == 2
    with pytest.raises(ValueError, match="device 4 is outside 0 to 3"):
        topology.island_of(4)


@pytest.mark.parametrize("islands", [(), ((),), ((0,), ()), ((0, 0),), ((0, 1), (1, 2)), ((1, 2),)])
def test_islands_must_be_a_partition(islands: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InvalidInputError, match="every device exactly once"):
        Topology(islands)
