"""Blocks are neither lost nor given twice, arrays are lent without a copy, copies move just the blocks asked for."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.engine.kv.kv_pool import BlockAllocator, KvPool
from nitsum_jax.engine.kv.transfer import PIECES, BlockMover, HostMover, pieces
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import instance_mesh
from nitsum_jax.meshes.vshards import VshardMap

BLOCKS = 64
SHAPE = PoolShape(BLOCKS, 2, 4, 1, 8, "float32")


def new_pool(devices: int = 2) -> KvPool:
    return KvPool(jax.devices()[:devices], SHAPE)


def fill(pool: KvPool) -> list[np.ndarray]:
    """Gives every device's array random contents; returns them."""
    contents = []
    for index, device in enumerate(pool.devices):
        values = np.random.default_rng(index).standard_normal((BLOCKS, *SHAPE.block_shape)).astype(np.float32)
        pool.replace(index, jax.device_put(values.copy(), device))
        contents.append(values)
    return contents


# ---- allocator


@given(total=st.integers(0, 40), data=st.data())
def test_every_block_is_free_or_taken_once(total: int, data: st.DataObject) -> None:
    allocator = BlockAllocator(total)
    taken: list[np.ndarray] = []
    for _ in range(data.draw(st.integers(0, 20))):
        give_back: bool = data.draw(st.booleans())
        if taken and give_back:
            allocator.give(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            taken.append(allocator.take(data.draw(st.integers(0, allocator.free))))
        held = np.concatenate([*taken, np.zeros(0, np.int32)])
        assert allocator.free + len(held) == total
        assert len(set(held.tolist())) == len(held)
        assert set(held.tolist()) <= set(range(total))
    for blocks in taken:
        allocator.give(blocks)
    assert sorted(allocator.take(total).tolist()) == list(range(total))


def test_more_than_are_free_cannot_be_taken() -> None:
    allocator = BlockAllocator(4)
    allocator.take(3)
    with pytest.raises(ValueError, match="2 blocks asked for, 1 free"):
        allocator.take(2)
    assert allocator.free == 1


def test_blocks_cannot_be_given_back_twice() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.take(3)
    allocator.give(blocks)
    with pytest.raises(ValueError, match="given twice"):
        allocator.give(blocks)


def test_taken_ids_do_not_change_when_others_are_given_back() -> None:
    allocator = BlockAllocator(4)
    first, second = allocator.take(2), allocator.take(2)
    before = first.tolist()
    allocator.give(second)
    allocator.give(allocator.take(1))
    assert first.tolist() == before


def test_reset_takes_all_back() -> None:
    allocator = BlockAllocator(4)
    allocator.take(3)
    allocator.reset()
    assert allocator.take(4).tolist() == BlockAllocator(4).take(4).tolist()


# ---- lending


def test_arrays_are_lent_in_rank_order_and_without_a_copy() -> None:
    pool = new_pool(4)
    contents = fill(pool)
    addresses = [pool.array(index).unsafe_buffer_pointer() for index in range(4)]
    vmap = VshardMap(4)
    spec = InstanceSpec((0, 1, 2, 3))
    order = vmap.ordered(spec.devices)
    lent = pool.lend(instance_mesh(pool.devices, spec, vmap), order)
    assert lent.shape == (4 * BLOCKS, *SHAPE.block_shape)
    np.testing.assert_array_equal(lent, np.concatenate([contents[device] for device in order]))
    for shard in lent.addressable_shards:
        assert shard.data.unsafe_buffer_pointer() == addresses[pool.devices.index(shard.device)]
    pool.take_back(lent, order)
    assert [pool.array(index).unsafe_buffer_pointer() for index in range(4)] == addresses


def test_a_lent_array_is_out_of_reach() -> None:
    pool = new_pool()
    mesh = instance_mesh(pool.devices, InstanceSpec((1,)), VshardMap(2))
    lent = pool.lend(mesh, [1])
    with pytest.raises(ValueError, match="device 1 is lent"):
        pool.array(1)
    with pytest.raises(ValueError, match="device 1 is lent already"):
        pool.lend(mesh, [1])
    assert pool.array(0).shape == (BLOCKS, *SHAPE.block_shape)
    pool.take_back(lent, [1])
    assert pool.array(1).devices() == {pool.devices[1]}


def test_reset_gives_a_fresh_array_and_all_blocks_back() -> None:
    pool = new_pool()
    fill(pool)
    pool.allocators[1].take(10)
    assert (pool.free, pool.total) == (2 * BLOCKS - 10, 2 * BLOCKS)
    pool.reset(1)
    assert pool.free == pool.total
    assert not np.asarray(pool.array(1)).any()
    assert pool.array(1).devices() == {pool.devices[1]}
    assert np.asarray(pool.array(0)).any()
    assert pool.bytes_per_device == pool.array(0).nbytes


# ---- moving


@given(st.integers(0, 5000))
def test_pieces_carry_exactly_the_blocks_asked_for(count: int) -> None:
    sizes = pieces(count)
    assert sum(sizes) == count
    assert set(sizes) <= set(PIECES)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", [BlockMover, HostMover])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 16, 23, 40])
def test_blocks_arrive_and_nothing_else_changes(count: int, kind: type[BlockMover] | type[HostMover]) -> None:
    pool = new_pool(3)
    mover = kind(pool)
    contents = fill(pool)
    rng = np.random.default_rng(count)
    old, new = (rng.permutation(BLOCKS)[:count].astype(np.int32) for _ in range(2))
    copy = mover.move(2, 0, old, new)
    assert copy.bytes == count * SHAPE.block_bytes
    jax.block_until_ready(copy.done)
    expected = contents[0].copy()
    expected[new] = contents[2][old]
    np.testing.assert_array_equal(pool.array(0), expected)
    np.testing.assert_array_equal(pool.array(1), contents[1])
    np.testing.assert_array_equal(pool.array(2), contents[2])
    assert pool.array(0).devices() == {pool.devices[0]}


@pytest.mark.parametrize("kind", [BlockMover, HostMover])
def test_blocks_can_change_places(kind: type[BlockMover] | type[HostMover]) -> None:
    # The copies of a switch are dispatched one behind the other: a block may be read for one and written for the next.
    pool = new_pool()
    mover = kind(pool)
    contents = fill(pool)
    mine, free = np.arange(0, 20, dtype=np.int32), np.arange(20, 40, dtype=np.int32)
    mover.move(0, 1, mine, free)
    mover.move(1, 0, mine, free)
    for here, there in ((0, 1), (1, 0)):
        np.testing.assert_array_equal(np.asarray(pool.array(here))[free], contents[there][mine])
        np.testing.assert_array_equal(np.asarray(pool.array(here))[mine], contents[here][mine])


def test_the_place_of_a_pool_tells_when_it_moves() -> None:
    pool = new_pool()
    mover = HostMover(pool)
    place = mover.place(0)
    update = jax.jit(lambda array: array.at[3].add(1), donate_argnums=0)
    pool.replace(0, update(pool.array(0)))
    assert mover.place(0) == place  # in place, as the steps do it
    keep = pool.array(0)
    pool.replace(0, keep + 1)
    assert mover.place(0) != place
