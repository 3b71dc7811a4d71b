"""Where sequences go when the layout changes, and which of their blocks must move."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from nitsum_jax.engine.kv_pool import KvPool
from nitsum_jax.engine.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Host:
    """What placing needs to know of an instance.

    Attributes:
      device_of: device of every vshard.
      rows: sequences that it can take.
      tp: its degree of tensor parallelism.
    """

    device_of: tuple[int, ...]
    rows: int
    tp: int


class Traveller(NamedTuple):
    """A sequence, and the device of every vshard that it lies on now."""

    sequence: Sequence
    devices: Seq[int]


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


def moved_shards(old: Seq[int], new: Seq[int]) -> int:
    """Vshards whose device changes: each costs one block per page."""
    return len(_route(tuple(old), tuple(new)).vshards)


@dataclasses.dataclass
class Ahead:
    """What was copied of a sequence before its switch.

    Attributes:
      host: index of the instance that it was copied for.
      devices: device of every vshard there.
      admitted: of the sequence then; it was computed anew since if that differs.
      table: i32[K, P], the first `pages` columns are blocks there, in the rows of vshards whose device changes.
      pages: how many were copied.
    """

    host: int
    devices: tuple[int, ...]
    admitted: int
    table: np.ndarray
    pages: int

    def release(self, old: Seq[int], pool: KvPool) -> None:
        """Frees its blocks; `old`: the devices that it comes from."""
        for vshard, (source, target) in enumerate(zip(old, self.devices, strict=True)):
            if source != target:
                pool.allocators[target].give(self.table[vshard, : self.pages])
        self.pages = 0


def choose_hosts(sequences: Seq[Traveller], hosts: Seq[Host], pool: KvPool) -> list[int | None]:
    """Which instance each sequence would go to, by the rules of `plan_moves`; takes nothing."""
    return _assign(sequences, hosts, pool, {})


def plan_moves(
    sequences: Seq[Traveller],
    hosts: Seq[Host],
    pool: KvPool,
    ahead: Mapping[int, Ahead] | None = None,
) -> Moves:
    """Assigns sequences to instances and takes the blocks that they need there.

    Longest first, each sequence goes where the fewest bytes must move among the instances that have room and are not
    fuller than balance allows: an instance takes its share by TP of all sequences, rounded up.  If some find no room
    in that order, the least urgent must go: then those admitted first are seated first.

    Args:
      sequences: that travel.
      hosts: the new instances.
      pool: target blocks are taken from it, and every table is rewritten to them; the source blocks stay taken until
        `freed` is given back.  Pages that were taken in advance are taken there too, but not copied.
      ahead: by id of the sequence, what was copied before; such a sequence goes where its copies are.

    Returns:
      What to copy and to free.  A sequence without room keeps its old table.
    """
    ahead = ahead or {}
    moves = Moves(_assign(sequences, hosts, pool, ahead), {}, {})
    ways: dict[tuple[tuple[int, ...], int], list[Sequence]] = {}
    for (sequence, old), h in zip(sequences, moves.assigned, strict=True):
        there = ahead.get(id(sequence))
        if h is not None and sequence.pages:
            ways.setdefault((tuple(old), h), []).append(sequence)
        elif h is None and there is not None:
            there.release(old, pool)
    for (old, h), members in ways.items():
        _remap(members, old, hosts[h].device_of, pool, moves, ahead)
    if pool.index is not None:
        _seat_beside_twins(sequences, hosts, pool, moves)
    return moves


def _seat_beside_twins(sequences: Seq[Traveller], hosts: Seq[Host], pool: KvPool, moves: Moves) -> None:
    """Who found no room for all its pages may find it for those that others have not brought: the oldest first."""
    homeless = [i for i, host in enumerate(moves.assigned) if host is None]
    counts = collections.Counter(host for host in moves.assigned if host is not None)
    for index in sorted(homeless, key=lambda i: sequences[i].sequence.admitted):
        sequence, old = sequences[index]
        for h, host in enumerate(hosts):
            if counts[h] < host.rows and _room_beside_twins(pool, sequence, old, host.device_of):
                counts[h] += 1
                moves.assigned[index] = h
                _remap([sequence], old, host.device_of, pool, moves, {})
                break


def _assign(sequences: Seq[Traveller], hosts: Seq[Host], pool: KvPool, ahead: Mapping[int, Ahead]) -> list[int | None]:
    # What was copied ahead has its place; the others come behind, the longest first.
    numbers = range(len(sequences))
    by_size = sorted(numbers, key=lambda i: (id(sequences[i].sequence) not in ahead, -sequences[i].sequence.pages, i))
    assigned = _seat(by_size, sequences, hosts, pool, ahead)
    if None in assigned:
        assigned = _seat(sorted(numbers, key=lambda i: sequences[i].sequence.admitted), sequences, hosts, pool, ahead)
    return assigned


def _seat(
    order: Seq[int],
    sequences: Seq[Traveller],
    hosts: Seq[Host],
    pool: KvPool,
    ahead: Mapping[int, Ahead],
) -> list[int | None]:
    """Gives each sequence in its turn a host, or None for want of room; takes nothing."""
    assigned: list[int | None] = [None] * len(sequences)
    whole = sum(host.tp for host in hosts)
    share = [-(-len(sequences) * host.tp // whole) for host in hosts] if hosts else []
    counts = [0] * len(hosts)
    left = [allocator.free for allocator in pool.allocators]
    routes: dict[tuple[int, ...], list[_Route]] = {}  # many sequences come from few instances
    for index in order:
        sequence, old = sequences[index]
        there = ahead.get(id(sequence))
        from_here = routes.get(tuple(old))
        if from_here is None:
            from_here = routes[tuple(old)] = [_route(tuple(old), host.device_of) for host in hosts]
        if there is not None:
            candidates = [there.host]
        else:
            keys = [
                (count >= most, len(route.vshards), count / host.tp, h)
                for h, (count, most, route, host) in enumerate(zip(counts, share, from_here, hosts, strict=True))
            ]
            candidates = [key[-1] for key in sorted(keys)]
        pages = sequence.pages - (0 if there is None else there.pages)
        for h in candidates:
            needed = from_here[h].targets
            if counts[h] < hosts[h].rows and all(
                left[device] >= (part.stop - part.start) * pages for device, part in needed
            ):
                for device, part in needed:
                    left[device] -= (part.stop - part.start) * pages
                counts[h] += 1
                assigned[index] = h
                break
    return assigned


def least_bytes(sequences: Seq[Traveller], hosts: Seq[Host], pool: KvPool) -> int:
    """Bytes that must move at least, whatever the assignment: a bound that knows neither balance nor room."""
    pages: collections.Counter[tuple[int, ...]] = collections.Counter()
    for sequence, old in sequences:
        pages[tuple(old)] += written_pages(sequence, pool)
    return pool.shape.block_bytes * sum(
        count * min((moved_shards(old, host.device_of) for host in hosts), default=0) for old, count in pages.items()
    )


def free(blocks: Mapping[int, Seq[np.ndarray]], pool: KvPool) -> None:
    """Gives blocks back: device -> arrays of ids."""
    for device, parts in blocks.items():
        pool.allocators[device].give(*parts)


def _room_beside_twins(pool: KvPool, sequence: Sequence, old: Seq[int], new: Seq[int]) -> bool:
    """Whether there is room for its pages, not counting blocks that others use there already."""
    if pool.index is None:
        return False
    needed: collections.Counter[int] = collections.Counter()
    written = written_pages(sequence, pool)
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source != target:
            twins = pool.index.twins(vshard, source, sequence.table[vshard, :written], target)
            used = int(np.count_nonzero(pool.allocators[target].users(twins[twins >= 0])))
            needed[target] += sequence.pages - used
    return all(pool.allocators[device].free >= count for device, count in needed.items())


def written_pages(sequence: Sequence, pool: KvPool) -> int:
    """Pages of a sequence that hold keys and values already; those behind them were only taken in advance."""
    return min(sequence.pages, -(-sequence.cached // pool.shape.page_size))


def _remap(
    sequences: Seq[Sequence], old: Seq[int], new: Seq[int], pool: KvPool, moves: Moves, ahead: Mapping[int, Ahead]
) -> None:
    """Gives sequences that go the same way the blocks that they need; all pages in one row, to handle few arrays."""
    route = _route(tuple(old), tuple(new))
    ends = list(itertools.accumulate(sequence.pages for sequence in sequences))
    starts = [0, *ends[:-1]]
    there = np.concatenate([sequence.table[:, : sequence.pages] for sequence in sequences], axis=1)[route.vshards]
    here = np.empty_like(there)
    brought, copied = np.zeros((2, ends[-1]), np.bool_)
    for sequence, start in zip(sequences, starts, strict=True):
        done = 0
        if (copies := ahead.get(id(sequence))) is not None:
            done = copies.pages
            here[:, start : start + done] = copies.table[route.vshards, :done]
            brought[start : start + done] = True
        copied[start + done : start + written_pages(sequence, pool)] = True
    unwritten = ~(brought | copied)
    # Pages in their order, whosesoever: the last are evicted first.
    by_page = np.argsort(np.arange(ends[-1]) - np.repeat(starts, np.diff([0, *ends])), kind="stable")
    for source, target, part in route.pairs:
        shards, was, comes = route.vshards[part], there[part], here[part]
        each = np.repeat(shards, np.count_nonzero(brought))
        pool.copied(each, source, was[:, brought].reshape(-1), target, comes[:, brought].reshape(-1))
        sources, comes[:, copied], targets = _bring(pool, shards, source, target, was[:, copied])
        shape = comes[:, unwritten].shape
        comes[:, unwritten] = pool.allocators[target].take(shape[0] * shape[1]).reshape(shape)
        if len(sources):
            lists = moves.blocks.setdefault(Link(source, target), Blocks([], []))
            lists[0].append(sources)
            lists[1].append(targets)
        moves.freed.setdefault(source, []).append(was[:, by_page].T.reshape(-1))
    for sequence, start in zip(sequences, starts, strict=True):
        sequence.table[route.vshards, : sequence.pages] = here[:, start : start + sequence.pages]


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
