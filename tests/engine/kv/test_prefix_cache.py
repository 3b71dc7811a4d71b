"""Shared pages: always the right contents, no block both free and used, none lost, whatever comes when."""

import collections
import dataclasses
import random
from typing import Any, cast

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.prefix_cache import PrefixCache
from nitsum_jax.engine.kv.prefix_index import PrefixIndex, extend_keys
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.switching.migration import Destination, Leaving, free, plan_moves
from nitsum_jax.meshes.layout import InstanceSpec, parse_layout
from nitsum_jax.meshes.vshards import VshardMap

DEVICES, K, PAGE, BLOCKS, PAGES = 4, 4, 2, 60, 40
VMAP = VshardMap(K)
LAYOUTS = ("tp1x4", "tp2x2", "tp4", "tp2+tp1x2", "tp1x2+tp2", "tp2")


@dataclasses.dataclass(eq=False)
class FakeInstance:
    device_of: list[int]
    order: tuple[int, ...]
    tp: int
    broken: bool = False
    lent: bool = False

    def lend_pool(self) -> None:
        assert not self.lent
        self.lent = True

    def regain_pool(self) -> None:
        assert self.lent
        self.lent = False


def instances_of(text: str) -> list[FakeInstance]:
    layout = parse_layout(text, DEVICES)
    return [
        FakeInstance([VMAP.device_of(spec.devices, k) for k in range(K)], tuple(spec.devices), spec.tp)
        for spec in layout.instances
    ]


class World:
    """Contents of blocks are (tokens up to the end of the page, vshard); copies and steps change them as real ones."""

    def __init__(self, layout: str, granule: int) -> None:
        self.pool = KvPool(jax.devices()[:DEVICES], PoolShape(BLOCKS, 1, PAGE, 1, 1, "float32"), prefix_vshards=K)
        self.content: dict[tuple[int, int], Any] = {}
        self.alive: list[tuple[LiveRequest, FakeInstance]] = []
        self.count = 0
        self.instances = instances_of(layout)
        self.cache = PrefixCache(self.pool, cast(Any, self), granule=granule, prompts_only=granule > PAGE)
        self.cache.least_copied_tokens = 4

    def move(self, source: int, target: int, old: np.ndarray, new: np.ndarray) -> None:
        """As BlockMover.move."""
        for a, b in zip(old.tolist(), new.tolist(), strict=True):
            self.content[target, b] = self.content.get((source, a))

    # ---- what an engine does

    def admit(self, dice: random.Random) -> None:
        self.count += 1
        beginning = [dice.randrange(2)] * dice.randrange(1, 25)
        prompt = beginning + [100 * self.count + i for i in range(dice.choice((0, 1, 5)))]
        home = dice.choice(self.instances)
        request = Request(str(self.count), tuple(prompt), 8)
        page_table = np.zeros((K, PAGES), np.int32)
        sequence = LiveRequest(request, seed=0, tokens=prompt, page_table=page_table, limit=len(prompt) + 8)
        prefix = self.cache.find(sequence)
        pages = -(-(len(prompt) + 1) // PAGE)
        slots = collections.Counter(home.device_of)
        room = min(self.pool.allocators[device].free // n for device, n in slots.items())
        if room < pages - self.cache.in_use(prefix, home.device_of):
            return
        self.cache.begin(sequence, prefix, cast(Any, home), cast(Any, self.instances))
        sequence.admitted = self.count
        assert not any(instance.lent for instance in self.instances)
        assert sequence.cached < len(prompt)
        self.grow(sequence, home, pages)
        self.alive.append((sequence, home))

    def grow(self, sequence: LiveRequest, home: FakeInstance, pages: int) -> None:
        for k, device in enumerate(home.device_of):
            sequence.page_table[k, sequence.pages : pages] = self.pool.allocators[device].take(
                max(0, pages - sequence.pages)
            )
        sequence.pages = max(sequence.pages, pages)

    def prefill(self, dice: random.Random) -> None:
        sequence, home = dice.choice(self.alive)
        count = 3 * PAGE if self.cache._prompts_only else dice.randrange(1, 9)  # there, one bucket
        if sequence.prefilling:
            self.cache.catch_up(sequence, home.device_of)
            assert sequence.cached < len(sequence.tokens)
            self.compute(sequence, home, min(count, sequence.target - sequence.cached))

    def decode(self, dice: random.Random) -> None:
        sequence, home = dice.choice(self.alive)
        if sequence.prefilling or len(sequence.tokens) >= sequence.limit:
            return
        pages = -(-(len(sequence.tokens) + 1) // PAGE)
        slots = collections.Counter(home.device_of)
        if any(self.pool.allocators[d].free < n * (pages - sequence.pages) for d, n in slots.items()):
            return
        sequence.tokens.append(7)
        self.grow(sequence, home, pages)
        self.compute(sequence, home, len(sequence.tokens) - sequence.cached)

    def compute(self, sequence: LiveRequest, home: FakeInstance, count: int) -> None:
        for position in range(sequence.cached, sequence.cached + count):
            for k, device in enumerate(home.device_of):
                block = int(sequence.page_table[k, position // PAGE])
                assert self.pool.allocators[device].users(np.array([block])) == 1, "a shared page was written to"
                self.content[device, block] = (tuple(sequence.tokens[: position + 1]), k)
        sequence.cached += count
        self.cache.enter(sequence, home.device_of)

    def end(self, dice: random.Random) -> None:
        self.leave(*self.alive.pop(dice.randrange(len(self.alive))))

    def leave(self, sequence: LiveRequest, home: FakeInstance) -> None:
        for k, device in enumerate(home.device_of):
            self.pool.allocators[device].give(sequence.page_table[k, : sequence.pages])

    def switch(self, dice: random.Random) -> None:
        new = instances_of(dice.choice(LAYOUTS))
        states = [allocator.state() for allocator in self.pool.allocators]
        tables = [sequence.page_table.copy() for sequence, _ in self.alive]
        travellers = [Leaving(sequence, home.device_of) for sequence, home in self.alive]
        moves = plan_moves(
            travellers,
            [Destination(InstanceSpec(i.order), tuple(i.device_of), 6, BLOCKS, PAGE) for i in new],
            self.pool,
        )
        if dice.random() < 0.2:  # it fails
            for allocator, state in zip(self.pool.allocators, states, strict=True):
                allocator.restore(state)
            for (sequence, _), page_table in zip(self.alive, tables, strict=True):
                sequence.page_table[:] = page_table
            return
        for (source, target), (old, there) in moves.blocks.items():
            self.move(source, target, np.concatenate(old), np.concatenate(there))
        free(moves.freed, self.pool)
        stay = []
        for (sequence, home), destination in zip(self.alive, moves.assigned, strict=True):
            if destination is None:
                self.leave(sequence, home)
            else:
                stay.append((sequence, new[destination]))
        self.alive, self.instances = stay, new

    def fail(self, dice: random.Random) -> None:
        """A step fails: its instance's sequences end, and the pools of its devices are new."""
        broken = dice.choice(self.instances)
        for sequence, home in self.alive:
            if home is broken:
                self.leave(sequence, home)
        self.alive = [(sequence, home) for sequence, home in self.alive if home is not broken]
        self.cache.forget(broken.order)
        for device in broken.order:
            for block in range(BLOCKS):
                self.content.pop((device, block), None)

    # ---- what must always hold

    def users_are_counted(self) -> None:
        used: collections.Counter[tuple[int, int]] = collections.Counter()
        for sequence, home in self.alive:
            for k, device in enumerate(home.device_of):
                used.update((device, block) for block in sequence.page_table[k, : sequence.pages].tolist())
        for device, allocator in enumerate(self.pool.allocators):
            users = allocator.users(np.arange(BLOCKS))
            assert {(device, b): n for b, n in enumerate(users.tolist()) if n} == {
                at: n for at, n in used.items() if at[0] == device
            }
            stack = allocator._stack[: allocator._stacked].tolist()
            idle = allocator._idle_blocks().tolist()
            assert len(idle) == allocator.idle
            assert sorted([*stack, *idle, *np.flatnonzero(users).tolist()]) == list(range(BLOCKS))

    def sequences_see_their_own_past(self) -> None:
        for sequence, home in self.alive:
            for page in range(-(-sequence.cached // PAGE)):
                end = min(sequence.cached, (page + 1) * PAGE)
                for k, device in enumerate(home.device_of):
                    held = self.content[device, int(sequence.page_table[k, page])]
                    assert held == (tuple(sequence.tokens[:end]), k)

    def close(self) -> None:
        for sequence, home in self.alive:
            self.leave(sequence, home)
        assert self.pool.free == self.pool.total
        for allocator in self.pool.allocators:
            assert sorted(allocator.take(BLOCKS).tolist()) == list(range(BLOCKS))
        assert self.pool.index is not None
        assert len(self.pool.index) == 0  # whatever was evicted is out of the index


KINDS = ["admit"] * 8 + ["prefill"] * 12 + ["decode"] * 4 + ["end"] * 5 + ["switch"] * 3 + ["fail"]


@settings(max_examples=60)
@given(
    layout=st.sampled_from(LAYOUTS),
    granule=st.sampled_from((PAGE, 3 * PAGE)),
    seed=st.integers(0, 2**32),
    steps=st.integers(20, 120),
)
def test_pages_are_right_and_blocks_conserved(layout: str, granule: int, seed: int, steps: int) -> None:
    dice = random.Random(seed)
    world = World(layout, granule)
    for _ in range(steps):
        kind = dice.choice(KINDS)
        if world.alive or kind in ("admit", "switch", "fail"):
            getattr(world, kind)(dice)
            world.users_are_counted()
            world.sequences_see_their_own_past()
    world.close()


# ---- the index and the order of eviction


def keys_of(tokens: list[int]) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, PAGE)
    return keys


def test_keys_tell_the_whole_past() -> None:
    assert len(keys_of([1, 2, 3])) == 1
    assert keys_of([1, 2, 3, 4])[:1] == keys_of([1, 2])
    assert keys_of([1, 2, 3, 4])[1] != keys_of([9, 2, 3, 4])[1]
    assert keys_of([3, 4])[0] != keys_of([1, 2, 3, 4])[1]
    grown = keys_of([1, 2])
    extend_keys(grown, [1, 2, 3, 4, 5], PAGE)
    assert grown == keys_of([1, 2, 3, 4])


def test_a_full_index_takes_no_more() -> None:
    index = PrefixIndex(1, 1, 3)
    index.add(keys_of(list(range(10))), np.array([0]), np.array([[0, 1, 2, 0, 1]], np.int32))
    assert len(index.find(keys_of(list(range(10))))) == len(index) == 3
    index.drop(0, np.array([1]))
    assert len(index.find(keys_of(list(range(10))))) == 1
    assert len(index) == 2


def test_the_longest_unused_go_first_and_ends_before_beginnings() -> None:
    pool = KvPool(jax.devices()[:1], PoolShape(8, 1, PAGE, 1, 1, "float32"), prefix_vshards=1)
    allocator, index = pool.allocators[0], pool.index
    assert index is not None
    old, new = keys_of([1] * 8), keys_of([2] * 8)
    for keys in (old, new):
        blocks = allocator.take(4)
        index.add(keys, np.array([0]), blocks[None])
        allocator.give(blocks)
        pool.tick()
    assert (allocator.free, allocator.idle) == (8, 8)
    for left in (3, 2):
        allocator.take(1)
        assert len(index.find(old)) == left
        assert len(index.find(new)) == 4


def test_a_pool_without_index_shares_nothing() -> None:
    pool = KvPool(jax.devices()[:1], PoolShape(8, 1, PAGE, 1, 1, "float32"))
    with pytest.raises(ValueError, match="no index"):
        PrefixCache(pool, cast(Any, None), granule=PAGE, prompts_only=False)
    assert pool.reuse(0, 0, np.array([1, 2]), 0).tolist() == [-1, -1]
