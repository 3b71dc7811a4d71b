"""Which sequence goes where when the layout changes: nothing is lost, nothing is moved that could stay."""

import collections
import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.switching.migration import (
    Destination,
    Leaving,
    Moves,
    free,
    least_bytes,
    moved_shards,
    plan_moves,
)
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.meshes.vshards import VshardMap

DEVICES, K, PAGES = 4, 4, 6
VMAP = VshardMap(K)
LAYOUTS = ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2", "tp1x2+tp2", "tp1", "tp2")


def device_map(layout: Layout, index: int) -> list[int]:
    """Device of every vshard of one instance."""
    return [VMAP.device_of(layout.instances[index].devices, vshard) for vshard in range(K)]


def destinations_of(layout: Layout, rows: int) -> list[Destination]:
    return [Destination(spec, tuple(device_map(layout, i)), rows, 1000, 1) for i, spec in enumerate(layout.instances)]


@dataclasses.dataclass
class World:
    """Sequences on a layout with their blocks taken from a pool."""

    pool: KvPool
    sequences: list[Leaving]

    @classmethod
    def of(cls, layout: Layout, pages: Sequence[int], blocks: int) -> "World":
        """Sequence i, of pages[i] pages, is on instance i (modulo their number) if it fits; else it is left out."""
        pool = KvPool(jax.devices()[:DEVICES], PoolShape(blocks, 1, 1, 1, 1, "float32"))
        world = cls(pool, [])
        for number, count in enumerate(pages):
            devices = device_map(layout, number % len(layout.instances))
            need = collections.Counter(devices)
            if any(pool.allocators[d].free < n * count for d, n in need.items()):
                continue
            page_table = np.zeros((K, PAGES), np.int32)
            sequence = LiveRequest(
                Request(str(number), (1,), 1), seed=0, tokens=[1], page_table=page_table, limit=2, pages=count
            )
            sequence.cached = count
            for vshard, device in enumerate(devices):
                sequence.page_table[vshard, :count] = pool.allocators[device].take(count)
            world.sequences.append(Leaving(sequence, devices))
        return world

    def blocks(self, places: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
        """(device, block) of all sequences; `places` has the device of every vshard of each."""
        return [
            (device, int(block))
            for (sequence, _), devices in zip(self.sequences, places, strict=True)
            for vshard, device in enumerate(devices)
            for block in sequence.page_table[vshard, : sequence.pages]
        ]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[World, Layout, list[Destination]]:
    before = parse_layout(draw(st.sampled_from(LAYOUTS)), DEVICES)
    after = parse_layout(draw(st.sampled_from(LAYOUTS)), DEVICES)
    pages = draw(st.lists(st.integers(0, PAGES), max_size=8))
    world = World.of(before, pages, draw(st.sampled_from([8, 30, 300])))
    return world, after, destinations_of(after, draw(st.integers(1, 8)))


def plan(world: World, destinations: Sequence[Destination]) -> tuple[Moves, list[list[int]]]:
    """The plan, and where every sequence lies after it."""
    moves = plan_moves(world.sequences, destinations, world.pool)
    places = [
        list(old) if destination is None else list(destinations[destination].device_of)
        for (_, old), destination in zip(world.sequences, moves.assigned, strict=True)
    ]
    return moves, places


@given(worlds())
def test_blocks_are_conserved(case: tuple[World, Layout, list[Destination]]) -> None:
    world, _, destinations = case
    total = world.pool.total
    moves, places = plan(world, destinations)
    held = world.blocks(places)
    assert len(set(held)) == len(held)  # no block twice
    free(moves.freed, world.pool)
    assert world.pool.free + len(held) == total
    # What is free now is what nobody holds.
    taken = {(d, int(b)) for d, alloc in enumerate(world.pool.allocators) for b in alloc.take(alloc.free)}
    assert not taken & set(held)


@given(worlds())
def test_rows_and_room_are_respected(case: tuple[World, Layout, list[Destination]]) -> None:
    world, _, destinations = case
    moves, _ = plan(world, destinations)
    counts = collections.Counter(destination for destination in moves.assigned if destination is not None)
    assert all(counts[index] <= destination.rows for index, destination in enumerate(destinations))
    assert all(allocator.free >= 0 for allocator in world.pool.allocators)
    # No sequence stays out that could go in: no rows anywhere, or too few blocks.
    for (sequence, old), destination in zip(world.sequences, moves.assigned, strict=True):
        if destination is None:
            for index, other in enumerate(destinations):
                need = collections.Counter(b for a, b in zip(old, other.device_of, strict=True) if a != b)
                full = any(world.pool.allocators[d].free < n * sequence.pages for d, n in need.items())
                assert counts[index] >= other.rows or full


@given(worlds())
def test_just_the_blocks_whose_device_changes_are_copied(case: tuple[World, Layout, list[Destination]]) -> None:
    world, _, destinations = case
    before = {id(sequence): sequence.page_table.copy() for sequence, _ in world.sequences}
    moves, places = plan(world, destinations)
    copies = {
        ((source, int(old)), (target, int(new)))
        for (source, target), (olds, news) in moves.blocks.items()
        for old, new in zip(np.concatenate(olds), np.concatenate(news), strict=True)
    }
    expected = set()
    for (sequence, old), new in zip(world.sequences, places, strict=True):
        for vshard in range(K):
            for page in range(sequence.pages):
                there = (old[vshard], int(before[id(sequence)][vshard, page]))
                here = (new[vshard], int(sequence.page_table[vshard, page]))
                if old[vshard] != new[vshard]:
                    expected.add((there, here))
                else:
                    assert there == here  # it stays where it is
    assert copies == expected
    freed = {(device, int(block)) for device, parts in moves.freed.items() for part in parts for block in part}
    assert freed == {source for source, _ in copies}
    block_bytes = world.pool.shape.block_bytes
    assert least_bytes(world.sequences, destinations, world.pool) <= len(copies) * block_bytes or None in moves.assigned


@given(worlds(), st.data())
def test_pages_taken_in_advance_are_not_copied(
    case: tuple[World, Layout, list[Destination]], data: st.DataObject
) -> None:
    world, _, destinations = case
    for sequence, _ in world.sequences:
        sequence.cached = data.draw(st.integers(0, sequence.pages))  # a page is one token here
    total = world.pool.total
    moves, places = plan(world, destinations)
    copied = sum(len(part) for olds, _ in moves.blocks.values() for part in olds)
    assert copied == sum(
        sequence.cached * moved_shards(old, new) for (sequence, old), new in zip(world.sequences, places, strict=True)
    )
    free(moves.freed, world.pool)
    assert world.pool.free + len(set(world.blocks(places))) == total


@given(worlds())
def test_each_goes_where_the_least_moves_while_there_is_room_for_all(
    case: tuple[World, Layout, list[Destination]],
) -> None:
    world, _, destinations = case
    roomy = [dataclasses.replace(destination, rows=100) for destination in destinations]
    for (sequence, old), _ in zip(world.sequences, range(1), strict=False):  # the first alone: balance allows any host
        alone = World(world.pool, [Leaving(sequence, old)])
        if all(world.pool.allocators[d].free >= K * sequence.pages for d in range(DEVICES)):
            moves, _ = plan(alone, roomy)
            chosen = moves.assigned[0]
            assert chosen is not None
            assert moved_shards(old, roomy[chosen].device_of) == min(moved_shards(old, h.device_of) for h in roomy)


def test_growing_goes_to_the_instance_that_has_the_most() -> None:
    before, after = parse_layout("tp1x4", DEVICES), parse_layout("tp2x2", DEVICES)
    world = World.of(before, [3, 3, 3, 3], 300)
    moves, places = plan(world, destinations_of(after, 8))
    assert moves.assigned == [0, 0, 1, 1]  # devices 0 and 1 make the first instance
    moved = [moved_shards(old, new) for (_, old), new in zip(world.sequences, places, strict=True)]
    assert moved == [K // 2] * 4  # half of the vshards stay: all that TP 2 leaves on a device


def test_sequences_are_shared_out_by_degree() -> None:
    before, after = parse_layout("tp4", DEVICES), parse_layout("tp2+tp1x2", DEVICES)
    world = World.of(before, [2] * 8, 300)
    moves, _ = plan(world, destinations_of(after, 8))
    assert collections.Counter(moves.assigned) == {0: 4, 1: 2, 2: 2}


def test_without_rows_a_sequence_keeps_its_table() -> None:
    before, after = parse_layout("tp1x4", DEVICES), parse_layout("tp4", DEVICES)
    world = World.of(before, [2] * 6, 300)
    tables = [sequence.page_table.copy() for sequence, _ in world.sequences]
    moves, _ = plan(world, destinations_of(after, 4))
    assert moves.assigned.count(None) == 2
    for (sequence, _), destination, page_table in zip(world.sequences, moves.assigned, tables, strict=True):
        assert (destination is None) == np.array_equal(sequence.page_table, page_table)


def test_those_admitted_last_go_when_there_is_no_room() -> None:
    before, after = parse_layout("tp1x4", DEVICES), parse_layout("tp4", DEVICES)
    world = World.of(before, [1, 6, 2, 5], 300)
    for (sequence, _), admitted in zip(world.sequences, (3, 2, 0, 1), strict=True):
        sequence.admitted = admitted
    moves, _ = plan(world, destinations_of(after, 2))
    assert [destination is not None for destination in moves.assigned] == [False, False, True, True]
