"""Where sequences go when the layout changes, and which of their blocks must move."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
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


def moved_shards(old: Seq[int], new: Seq[int]) -> int:
    """Vshards whose device changes: each costs one block per page."""
    return sum(a != b for a, b in zip(old, new, strict=True))


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
    return _assign(sequences, hosts, pool, {}, lambda index, h: None)


def plan_moves(
    sequences: Seq[tuple[Sequence, Seq[int]]],
    hosts: Seq[Host],
    pool: KvPool,
    ahead: Mapping[int, Ahead] | None = None,
) -> Moves:
    """Assigns sequences to instances and takes the blocks that they need there.

    Longest first, each sequence goes where the fewest bytes must move among the instances that have room and are not
    fuller than balance allows: an instance takes its share by TP of all sequences, rounded up.

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
    moves = Moves([None] * len(sequences), {}, {})

    def seat(index: int, h: int) -> None:
        sequence, old = sequences[index]
        _remap(sequence, old, hosts[h].device_of, pool, moves, ahead.get(id(sequence)))

    moves.assigned = _assign(sequences, hosts, pool, ahead, seat)
    for index, (sequence, old) in enumerate(sequences):
        if moves.assigned[index] is None and id(sequence) in ahead:
            ahead[id(sequence)].release(old, pool)
    return moves


def _assign(
    sequences: Seq[tuple[Sequence, Seq[int]]],
    hosts: Seq[Host],
    pool: KvPool,
    ahead: Mapping[int, Ahead],
    seat: Callable[[int, int], None],
) -> list[int | None]:
    assigned: list[int | None] = [None] * len(sequences)
    whole = sum(host.tp for host in hosts)
    share = [-(-len(sequences) * host.tp // whole) for host in hosts] if hosts else []
    counts = [0] * len(hosts)
    # What was copied ahead has its place; the others come behind, the longest first.
    order = sorted(range(len(sequences)), key=lambda i: (id(sequences[i][0]) not in ahead, -sequences[i][0].pages, i))
    for index in order:
        sequence, old = sequences[index]
        there = ahead.get(id(sequence))
        candidates = (
            [there.host]
            if there is not None
            else sorted(
                range(len(hosts)),
                key=lambda h: (
                    counts[h] >= share[h],
                    moved_shards(old, hosts[h].device_of),
                    counts[h] / hosts[h].tp,
                    h,
                ),
            )
        )
        pages = sequence.pages - (0 if there is None else there.pages)
        for h in candidates:
            new = hosts[h].device_of
            if counts[h] < hosts[h].rows and (
                _room(pool, pages, old, new) or _room_beside_twins(pool, sequence, pages, old, new)
            ):
                counts[h] += 1
                assigned[index] = h
                seat(index, h)
                break
    return assigned


def least_bytes(sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool) -> int:
    """Bytes that must move at least, whatever the assignment: a bound that knows neither balance nor room."""
    block_bytes = pool.shape.block_bytes
    return sum(
        written_pages(sequence, pool)
        * block_bytes
        * min((moved_shards(old, host.device_of) for host in hosts), default=0)
        for sequence, old in sequences
    )


def free(blocks: Mapping[int, Seq[np.ndarray]], pool: KvPool) -> None:
    """Gives blocks back: device -> arrays of ids."""
    for device, parts in blocks.items():
        for part in parts:
            pool.allocators[device].give(part)


def _room(pool: KvPool, pages: int, old: Seq[int], new: Seq[int]) -> bool:
    needed = collections.Counter(b for a, b in zip(old, new, strict=True) if a != b)
    return all(pool.allocators[device].free >= count * pages for device, count in needed.items())


def _room_beside_twins(pool: KvPool, sequence: Sequence, pages: int, old: Seq[int], new: Seq[int]) -> bool:
    """As `_room`, not counting blocks that others use there already."""
    if pool.index is None:
        return False
    needed: collections.Counter[int] = collections.Counter()
    written = written_pages(sequence, pool)
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source != target:
            blocks = sequence.table[vshard, sequence.pages - pages : written]
            twins = pool.index.twins(vshard, source, blocks, target)
            needed[target] += pages - int(np.count_nonzero(pool.allocators[target].users(twins[twins >= 0])))
    return all(pool.allocators[device].free >= count for device, count in needed.items())


def written_pages(sequence: Sequence, pool: KvPool) -> int:
    """Pages of a sequence that hold keys and values already; those behind them were only taken in advance."""
    return min(sequence.pages, -(-sequence.cached // pool.shape.page_size))


def _remap(sequence: Sequence, old: Seq[int], new: Seq[int], pool: KvPool, moves: Moves, ahead: Ahead | None) -> None:
    written = written_pages(sequence, pool)
    done = 0 if ahead is None else ahead.pages
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source == target or not sequence.pages:
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
