"""Where sequences go when the layout changes, and which of their blocks must move."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq

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


@dataclasses.dataclass
class Moves:
    """The outcome of planning.

    Attributes:
      assigned: index of the host of each sequence, in the order given; None: there was no room, compute it anew.
      blocks: (source device, target device) -> block ids there and here.
      freed: device -> blocks that are free once the copies are dispatched.
    """

    assigned: list[int | None]
    blocks: dict[tuple[int, int], tuple[list[np.ndarray], list[np.ndarray]]]
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


def choose_hosts(sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool) -> list[int | None]:
    """Which instance each sequence would go to, by the rules of `plan_moves`; takes nothing."""
    return _assign(sequences, hosts, pool, {})


def plan_moves(
    sequences: Seq[tuple[Sequence, Seq[int]]],
    hosts: Seq[Host],
    pool: KvPool,
    ahead: Mapping[int, Ahead] | None = None,
) -> Moves:
    """Assigns sequences to instances and takes the blocks that they need there.

    Longest first, each sequence goes where the fewest bytes must move among the instances that have room and are not
    fuller than balance allows: an instance takes its share by TP of all sequences, rounded up.  If some find no room
    in that order, the least urgent must go: then those admitted first are seated first.

    Args:
      sequences: with the device of every vshard that they lie on now.
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


def _seat_beside_twins(sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool, moves: Moves) -> None:
    """Who found no room for all its pages may find it for those that others have not brought: the oldest first."""
    homeless = [i for i, host in enumerate(moves.assigned) if host is None]
    counts = collections.Counter(host for host in moves.assigned if host is not None)
    for index in sorted(homeless, key=lambda i: sequences[i][0].admitted):
        sequence, old = sequences[index]
        for h, host in enumerate(hosts):
            if counts[h] < host.rows and _room_beside_twins(pool, sequence, old, host.device_of):
                counts[h] += 1
                moves.assigned[index] = h
                _remap_shared(sequence, old, host.device_of, pool, moves, None)
                break


def _assign(
    sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool, ahead: Mapping[int, Ahead]
) -> list[int | None]:
    # What was copied ahead has its place; the others come behind, the longest first.
    numbers = range(len(sequences))
    by_size = sorted(numbers, key=lambda i: (id(sequences[i][0]) not in ahead, -sequences[i][0].pages, i))
    assigned = _seat(by_size, sequences, hosts, pool, ahead)
    if None in assigned:
        assigned = _seat(sorted(numbers, key=lambda i: sequences[i][0].admitted), sequences, hosts, pool, ahead)
    return assigned


def _seat(
    order: Seq[int],
    sequences: Seq[tuple[Sequence, Seq[int]]],
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
            from_here = routes[tuple(old)] = [_route(tuple(old), tuple(host.device_of)) for host in hosts]
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


def least_bytes(sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool) -> int:
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
    if pool.index is not None:
        for sequence in sequences:
            _remap_shared(sequence, old, new, pool, moves, ahead.get(id(sequence)))
        return
    route = _route(tuple(old), tuple(new))
    ends = list(itertools.accumulate(sequence.pages for sequence in sequences))
    there = np.concatenate([sequence.table[:, : sequence.pages] for sequence in sequences], axis=1)[route.vshards]
    taken, copied = np.ones(ends[-1], np.bool_), np.zeros(ends[-1], np.bool_)
    here = np.empty_like(there)
    for sequence, end in zip(sequences, ends, strict=True):
        start, done = end - sequence.pages, 0
        if (copies := ahead.get(id(sequence))) is not None:
            done = copies.pages
            here[:, start : start + done] = copies.table[route.vshards, :done]
            taken[start : start + done] = False
        copied[start + done : start + written_pages(sequence, pool)] = True
    for target, part in route.targets:
        shape = (part.stop - part.start, int(np.count_nonzero(taken)))
        here[part, taken] = pool.allocators[target].take(shape[0] * shape[1]).reshape(shape)
    for sequence, end in zip(sequences, ends, strict=True):
        sequence.table[route.vshards, : sequence.pages] = here[:, end - sequence.pages : end]
    for source, target, part in route.pairs:
        if copied.any():
            sources, targets = moves.blocks.setdefault((source, target), ([], []))
            sources.append(there[part, copied].reshape(-1))
            targets.append(here[part, copied].reshape(-1))
        moves.freed.setdefault(source, []).append(there[part].reshape(-1))


def _remap_shared(
    sequence: Sequence, old: Seq[int], new: Seq[int], pool: KvPool, moves: Moves, ahead: Ahead | None
) -> None:
    """As `_remap`, where pages may be there already because others brought or left them."""
    written = written_pages(sequence, pool)
    done = 0 if ahead is None else ahead.pages
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source == target:
            continue
        there = sequence.table[vshard, : sequence.pages].copy()
        here = np.full(sequence.pages, -1, np.int32)
        if ahead is not None:
            here[:done] = ahead.table[vshard, :done]
            pool.copied(vshard, source, there[:done], target, here[:done])
        if written > done:  # others may have brought the same pages there
            here[done:written] = pool.reuse(vshard, source, there[done:written], target)
        missing = np.flatnonzero(here < 0)
        here[missing] = pool.allocators[target].take(len(missing))
        sequence.table[vshard, : sequence.pages] = here
        copied = missing[missing < written]
        if len(copied):
            sources, targets = moves.blocks.setdefault((source, target), ([], []))
            sources.append(there[copied])
            targets.append(here[copied])
            pool.copied(vshard, source, there[copied], target, here[copied])
        moves.freed.setdefault(source, []).append(there)
