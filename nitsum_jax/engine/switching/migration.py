"""Where sequences go when the layout changes, and which of their blocks must move."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.window import dropped_columns
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.meshes.layout import InstanceSpec


@dataclasses.dataclass(frozen=True)
class Destination:
    """What placing needs to know of an instance.

    Attributes:
      spec: devices and role.
      device_of: device of every vshard.
      rows: sequences that it can take.
      pages: of its devices when empty.
      page_size: tokens in a page.
    """

    spec: InstanceSpec
    device_of: tuple[int, ...]
    rows: int
    pages: int
    page_size: int

    @property
    def tp(self) -> int:
        """Degree of tensor parallelism."""
        return self.spec.tp


class Leaving(NamedTuple):
    """A sequence, and the device of every vshard that it lies on now."""

    sequence: LiveRequest
    devices: Sequence[int]


class Link(NamedTuple):
    """Copies go from one device to another."""

    source: int
    target: int


class Blocks(NamedTuple):
    """What is copied over a link: block ids there, and where each goes here."""

    old: list[np.ndarray]
    new: list[np.ndarray]


@dataclasses.dataclass
class Moves:
    """The outcome of planning.

    Attributes:
      assigned: index of the host of each sequence, in the order given; None: there was no room, compute it anew.
      blocks: what is copied over each link.
      freed: device -> blocks that are free once the copies are dispatched.
    """

    assigned: list[int | None]
    blocks: dict[Link, Blocks]
    freed: dict[int, list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class _Route:
    """From one set of devices to another: hundreds of sequences share a few of these.

    Attributes:
      vshards: those whose device changes, by target and source.
      targets: (device, which of `vshards` come to it).
      pairs: (source, target, which of `vshards` go from there to here).
    """

    vshards: np.ndarray
    targets: tuple[tuple[int, slice], ...]
    pairs: tuple[tuple[int, int, slice], ...]


@functools.lru_cache(maxsize=4096)
def _route(old: tuple[int, ...], new: tuple[int, ...]) -> _Route:
    moved = sorted((b, a, k) for k, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
    targets, pairs = [], []
    for target, group in itertools.groupby(enumerate(moved), key=lambda item: item[1][0]):
        members = list(group)
        targets.append((target, slice(members[0][0], members[-1][0] + 1)))
    for (target, source), group in itertools.groupby(enumerate(moved), key=lambda item: item[1][:2]):
        members = list(group)
        pairs.append((source, target, slice(members[0][0], members[-1][0] + 1)))
    return _Route(np.array([vshard for _, _, vshard in moved], np.intp), tuple(targets), tuple(pairs))


def moved_shards(old: Sequence[int], new: Sequence[int]) -> int:
    """Vshards whose device changes: each costs one block per page."""
    return len(_route(tuple(old), tuple(new)).vshards)


@dataclasses.dataclass
class CopiedPages:
    """What was copied of a sequence before its switch.

    Attributes:
      destination: index of the instance that it was copied for.
      devices: device of every vshard there.
      admitted: of the sequence then; it was computed anew since if that differs.
      page_table: i32[K, P], the first `pages` columns are blocks there, in the rows of vshards whose device changes.
      pages: how many were copied.
    """

    destination: int
    devices: tuple[int, ...]
    admitted: int
    page_table: np.ndarray
    pages: int

    def release(self, old: Sequence[int], pool: KvPool) -> None:
        """Frees its blocks; `old`: the devices that it comes from."""
        for vshard, (source, target) in enumerate(zip(old, self.devices, strict=True)):
            if source != target:
                pool.allocators[target].give(self.page_table[vshard, : self.pages])
        self.pages = 0


class SeatsLeft(Protocol):
    """What is free at the hosts; sequences and hosts go by their numbers."""

    # ruff: noqa: D102
    def fits(self, sequence: int, destination: int, /) -> bool: ...
    def take(self, sequence: int, destination: int, /) -> None: ...


Seats = Callable[[Sequence[Leaving], Sequence[Destination], Callable[[], SeatsLeft]], list[int | None]]
"""Gives each sequence a host that it fits, or None; the callable begins to count what is free.  See `Policy.place`."""


def choose_destinations(
    sequences: Sequence[Leaving], destinations: Sequence[Destination], pool: KvPool, seats: Seats
) -> list[int | None]:
    """Which instance each sequence would go to; takes nothing."""
    return seats(sequences, destinations, lambda: _FreeBlocks(sequences, destinations, pool, {}))


def fewest_bytes(
    sequences: Sequence[Leaving], destinations: Sequence[Destination], room: Callable[[], SeatsLeft]
) -> list[int | None]:
    """The rule of a policy that knows only the bytes of sequences.

    Longest first, each sequence goes where the fewest bytes must move among the instances that have room and are not
    fuller than balance allows: an instance takes its share by TP of all sequences, rounded up.  If some find no room
    in that order, the least urgent must go: then those admitted first are seated first.
    """
    numbers = range(len(sequences))
    assigned = _fewest_bytes(
        sorted(numbers, key=lambda i: (-sequences[i].sequence.pages, i)), sequences, destinations, room()
    )
    if None in assigned:
        by_age = sorted(numbers, key=lambda i: sequences[i].sequence.admitted)
        assigned = _fewest_bytes(by_age, sequences, destinations, room())
    return assigned


def plan_moves(
    sequences: Sequence[Leaving],
    destinations: Sequence[Destination],
    pool: KvPool,
    ahead: Mapping[int, CopiedPages] | None = None,
    seats: Seats = fewest_bytes,
) -> Moves:
    """Assigns sequences to instances and takes the blocks that they need there.

    Args:
      sequences: that travel.
      destinations: the new instances.
      pool: target blocks are taken from it, and every table is rewritten to them; the source blocks stay taken until
        `freed` is given back.  Pages that were taken in advance are taken there too, but not copied.
      ahead: by id of the sequence, what was copied before; such a sequence goes where its copies are.
      seats: chooses among the hosts that have room.

    Returns:
      What to copy and to free.  A sequence without room keeps its old table.
    """
    ahead = ahead or {}
    moves = Moves(seats(sequences, destinations, lambda: _FreeBlocks(sequences, destinations, pool, ahead)), {}, {})
    ways: dict[tuple[tuple[int, ...], int], list[LiveRequest]] = {}
    for (sequence, old), h in zip(sequences, moves.assigned, strict=True):
        there = ahead.get(id(sequence))
        if h is not None and sequence.pages:
            ways.setdefault((tuple(old), h), []).append(sequence)
        elif h is None and there is not None:
            there.release(old, pool)
    for (old, h), members in ways.items():
        _remap(members, old, destinations[h].device_of, pool, moves, ahead)
    if pool.index is not None:
        _seat_beside_twins(sequences, destinations, pool, moves, seats)
    return moves


def _seat_beside_twins(
    sequences: Sequence[Leaving], destinations: Sequence[Destination], pool: KvPool, moves: Moves, seats: Seats
) -> None:
    """A sequence without room for all its pages may have room for those that others did not bring: oldest first."""
    homeless = [i for i, destination in enumerate(moves.assigned) if destination is None]
    counts = collections.Counter(destination for destination in moves.assigned if destination is not None)
    for index in sorted(homeless, key=lambda i: sequences[i].sequence.admitted):
        sequence, old = sequences[index]
        (h,) = seats(
            [sequences[index]], destinations, _BesideTwins(sequences[index], destinations, pool, counts).counted
        )
        if h is not None:
            counts[h] += 1
            moves.assigned[index] = h
            _remap([sequence], old, destinations[h].device_of, pool, moves, {})


class _BesideTwins:
    """Room for one sequence where others have brought pages of it."""

    def __init__(
        self, traveller: Leaving, destinations: Sequence[Destination], pool: KvPool, counts: Mapping[int, int]
    ):
        self._traveller, self._hosts, self._pool, self._counts = traveller, destinations, pool, counts

    def counted(self) -> "_BesideTwins":
        return self  # of one sequence nothing is to be counted

    def fits(self, sequence: int, destination: int) -> bool:
        del sequence
        one, old = self._traveller
        there = self._hosts[destination]
        return self._counts.get(destination, 0) < there.rows and _room_beside_twins(
            self._pool, one, old, there.device_of
        )

    def take(self, sequence: int, destination: int) -> None: ...


class _FreeBlocks:
    """Rows and blocks that are free; what was copied ahead has its place, and no other one."""

    def __init__(
        self,
        sequences: Sequence[Leaving],
        destinations: Sequence[Destination],
        pool: KvPool,
        ahead: Mapping[int, CopiedPages],
    ):
        self._sequences = sequences
        self._hosts = destinations
        self._rows = [destination.rows for destination in destinations]
        self._left = [allocator.free for allocator in pool.allocators]
        # Blocks by device for a page of a sequence from some devices: many sequences come from few instances.
        self._each: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._bound: dict[int, int | None] = {}
        for number, (sequence, _) in enumerate(sequences):
            there = ahead.get(id(sequence))
            if there is not None:
                fits = self._has_room(number, there.destination, there.pages)
                self._bound[number] = there.destination if fits else None
                if fits:
                    self._take(number, there.destination, there.pages)

    def fits(self, sequence: int, destination: int) -> bool:
        if sequence in self._bound:
            return self._bound[sequence] == destination
        return self._has_room(sequence, destination, 0)

    def take(self, sequence: int, destination: int) -> None:
        if sequence not in self._bound:
            self._take(sequence, destination, 0)

    def _needs(self, sequence: int, destination: int, done: int) -> list[tuple[int, int]]:
        """Blocks by device."""
        one, old = self._sequences[sequence]
        key = id(old), destination
        each = self._each.get(key)
        if each is None:
            targets = _route(tuple(old), self._hosts[destination].device_of).targets
            each = self._each[key] = [(device, part.stop - part.start) for device, part in targets]
        pages = one.pages - done
        return [(device, count * pages) for device, count in each]

    def _has_room(self, sequence: int, destination: int, done: int) -> bool:
        needs = self._needs(sequence, destination, done)
        return self._rows[destination] > 0 and all(self._left[device] >= blocks for device, blocks in needs)

    def _take(self, sequence: int, destination: int, done: int) -> None:
        self._rows[destination] -= 1
        for device, blocks in self._needs(sequence, destination, done):
            self._left[device] -= blocks


def _fewest_bytes(
    order: Sequence[int], sequences: Sequence[Leaving], destinations: Sequence[Destination], room: SeatsLeft
) -> list[int | None]:
    """Gives each sequence in its turn a host, or None for want of room."""
    assigned: list[int | None] = [None] * len(sequences)
    whole = sum(destination.tp for destination in destinations)
    share = [-(-len(sequences) * destination.tp // whole) for destination in destinations]
    counts = [0] * len(destinations)
    for index in order:
        old = sequences[index].devices
        keys = sorted(
            (count >= most, moved_shards(old, destination.device_of), count / destination.tp, h)
            for h, (count, most, destination) in enumerate(zip(counts, share, destinations, strict=True))
        )
        for *_, h in keys:
            if room.fits(index, h):
                room.take(index, h)
                counts[h] += 1
                assigned[index] = h
                break
    return assigned


def least_bytes(sequences: Sequence[Leaving], destinations: Sequence[Destination], pool: KvPool) -> int:
    """Bytes that must move at least, whatever the assignment: a bound that knows neither balance nor room."""
    pages: collections.Counter[tuple[int, ...]] = collections.Counter()
    for sequence, old in sequences:
        pages[tuple(old)] += written_pages(sequence, pool)
    return pool.shape.block_bytes * sum(
        count * min((moved_shards(old, destination.device_of) for destination in destinations), default=0)
        for old, count in pages.items()
    )


def free(blocks: Mapping[int, Sequence[np.ndarray]], pool: KvPool) -> None:
    """Gives blocks back: device -> arrays of ids."""
    for device, parts in blocks.items():
        pool.allocators[device].give(*parts)


def _room_beside_twins(pool: KvPool, sequence: LiveRequest, old: Sequence[int], new: Sequence[int]) -> bool:
    """Whether there is room for its pages, not counting blocks that others use there already."""
    if pool.index is None:
        return False
    needed: collections.Counter[int] = collections.Counter()
    written = written_pages(sequence, pool)
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source != target:
            twins = pool.index.twins(vshard, source, sequence.page_table[vshard, :written], target)
            used = int(np.count_nonzero(pool.allocators[target].users(twins[twins >= 0])))
            needed[target] += sequence.pages - used
    return all(pool.allocators[device].free >= count for device, count in needed.items())


def written_pages(sequence: LiveRequest, pool: KvPool) -> int:
    """Pages of a sequence that hold keys and values already; those behind them were only taken in advance."""
    return min(sequence.pages, -(-sequence.cached // pool.shape.page_size))


def _remap(
    sequences: Sequence[LiveRequest],
    old: Sequence[int],
    new: Sequence[int],
    pool: KvPool,
    moves: Moves,
    ahead: Mapping[int, CopiedPages],
) -> None:
    """Gives sequences that go the same way the blocks that they need; all pages in one row, to handle few arrays."""
    route = _route(tuple(old), tuple(new))
    ends = list(itertools.accumulate(sequence.pages for sequence in sequences))
    starts = [0, *ends[:-1]]
    there = np.concatenate([sequence.page_table[:, : sequence.pages] for sequence in sequences], axis=1)[route.vshards]
    here = np.empty_like(there)
    brought, copied = np.zeros((2, ends[-1]), np.bool_)
    for sequence, start in zip(sequences, starts, strict=True):
        done = 0
        if (copies := ahead.get(id(sequence))) is not None:
            done = copies.pages
            here[:, start : start + done] = copies.page_table[route.vshards, :done]
            brought[start : start + done] = True
        copied[start + done : start + written_pages(sequence, pool)] = True
    unwritten = ~(brought | copied)
    known = brought & ~dropped_columns(sequences)  # behind a window the table has another block than was copied
    # Pages in their order, whosesoever: the last are evicted first.
    by_page = np.argsort(np.arange(ends[-1]) - np.repeat(starts, np.diff([0, *ends])), kind="stable")
    for source, target, part in route.pairs:
        shards, was, comes = route.vshards[part], there[part], here[part]
        each = np.repeat(shards, np.count_nonzero(known))
        pool.copied(each, source, was[:, known].reshape(-1), target, comes[:, known].reshape(-1))
        sources, comes[:, copied], targets = _bring(pool, shards, source, target, was[:, copied])
        shape = comes[:, unwritten].shape
        comes[:, unwritten] = pool.allocators[target].take(shape[0] * shape[1]).reshape(shape)
        if len(sources):
            lists = moves.blocks.setdefault(Link(source, target), Blocks([], []))
            lists[0].append(sources)
            lists[1].append(targets)
        moves.freed.setdefault(source, []).append(was[:, by_page].T.reshape(-1))
    for sequence, start in zip(sequences, starts, strict=True):
        sequence.page_table[route.vshards, : sequence.pages] = here[:, start : start + sequence.pages]


def _bring(
    pool: KvPool, shards: np.ndarray, source: int, target: int, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of `target` for i32[V, n] of `source`: (those to copy, i32[V, n] blocks here, where the copies go)."""
    flat, allocator = blocks.reshape(-1), pool.allocators[target]
    if pool.index is None:
        targets = allocator.take(len(flat))
        return flat, targets.reshape(blocks.shape), targets
    # Others may have brought or left the same pages there, or bring them now.
    sources, first, inverse, users = np.unique(flat, return_index=True, return_inverse=True, return_counts=True)
    shards = np.repeat(shards, blocks.shape[1])[first]
    here = pool.reuse(shards, source, sources, target, users)
    new = here < 0
    here[new] = allocator.take(int(np.count_nonzero(new)))
    allocator.share(here[new], users[new] - 1)
    pool.copied(shards[new], source, sources[new], target, here[new])
    return sources[new], here[inverse].reshape(blocks.shape), here[new]
