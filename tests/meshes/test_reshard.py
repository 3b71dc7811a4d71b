"""Moving arrays between shardings, and the bytes that land."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.meshes.reshard import reshard


def mesh(*devices: int) -> Mesh:
    return Mesh(np.array([jax.devices()[d] for d in devices]), (TP_AXIS,))


def test_host_arrays_land_whole_on_every_device() -> None:
    tree = {"a": np.arange(8, dtype=np.float32), "b": (np.ones((4, 2), np.int32),)}
    placed, landed = reshard(tree, NamedSharding(mesh(0, 1), P()))
    assert landed == 2 * (8 * 4 + 8 * 4)
    assert placed.keys() == {"a", "b"}
    assert isinstance(placed["b"], tuple)
    for before, after in zip(jax.tree.leaves(tree), jax.tree.leaves(placed), strict=True):
        np.testing.assert_array_equal(before, after)


def test_what_is_there_does_not_land_again() -> None:
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    four, _ = reshard(rows, NamedSharding(mesh(0, 1, 2, 3), P(TP_AXIS)))
    assert reshard(four, four.sharding)[1] == 0
    # Device 0 has rows 0-1 of 0-3, device 1 rows 2-3 of 4-7.
    two, landed = reshard(four, NamedSharding(mesh(0, 1), P(TP_AXIS)))
    assert landed == (2 + 4) * 2 * 4
    whole, landed = reshard(two, SingleDeviceSharding(jax.devices()[0]))
    assert landed == 4 * 2 * 4
    np.testing.assert_array_equal(whole, rows)


def test_a_tree_of_shardings() -> None:
    tree = {"cut": jax.device_put(np.ones((4,), np.float32), jax.devices()[0]), "whole": np.ones((3,), np.float32)}
    placed, landed = reshard(
        tree, {"cut": NamedSharding(mesh(0, 1), P(TP_AXIS)), "whole": NamedSharding(mesh(0, 1), P())}
    )
    assert landed == 2 * 4 + 2 * 3 * 4
    assert placed["cut"].sharding.spec == P(TP_AXIS)


def test_scalars_and_empty_arrays() -> None:
    _, landed = reshard([np.float32(1), np.ones((0, 4), np.float32)], jax.devices()[1])
    assert landed == 4


def test_a_sharding_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="evenly divide"):
        reshard(np.ones((3,), np.float32), NamedSharding(mesh(0, 1), P(TP_AXIS)))


specs = st.sampled_from([P(), P(TP_AXIS), P(None, TP_AXIS)])
groups = st.sampled_from([(0,), (1,), (0, 1), (1, 0), (2, 3), (0, 1, 2, 3), (3, 1, 0, 2)])


@settings(max_examples=40)
@given(groups, specs, groups, specs)
def test_landing_bytes_agree_with_counting_elements(
    from_group: tuple[int, ...], from_spec: P, to_group: tuple[int, ...], to_spec: P
) -> None:
    values = np.arange(32, dtype=np.float32).reshape(4, 8)
    before, _ = reshard(values, NamedSharding(mesh(*from_group), from_spec))
    after, landed = reshard(before, NamedSharding(mesh(*to_group), to_spec))
    had = {shard.device: set(np.asarray(shard.data).ravel().tolist()) for shard in before.addressable_shards}
    new = 0
    for shard in after.addressable_shards:
        new += len(set(np.asarray(shard.data).ravel().tolist()) - had.get(shard.device, set()))
    assert landed == new * 4
    np.testing.assert_array_equal(after, values)
