"""Where an instance lies."""

from random import Random

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.mesh import Geometries
from nitsum_jax.meshes.vshards import VshardMap

VMAP = VshardMap(8)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 7), st.randoms())
def test_order_devices_of_vshards_and_mesh_are_those_of_the_map(tp: int, first: int, random: Random) -> None:
    geometries = Geometries(jax.devices(), VMAP)
    devices = tuple(range(min(first, 8 - tp), min(first, 8 - tp) + tp))
    found = geometries.of(devices)
    assert found.order == VMAP.ordered(devices)
    assert found.device_of == tuple(VMAP.device_of(devices, vshard) for vshard in range(8))
    assert found.mesh.devices.tolist() == [jax.devices()[device] for device in found.order]
    shuffled = list(devices)
    random.shuffle(shuffled)
    assert geometries.of(shuffled) is found  # worked out once, however it is asked for


def test_devices_that_cannot_form_an_instance_have_no_geometry() -> None:
    with pytest.raises(InvalidInputError, match="hold the same vshards"):
        Geometries(jax.devices(), VMAP).of((0, 2))
