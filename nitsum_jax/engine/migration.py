"""Where sequences go when the layout changes, and which of their blocks must move."""

import collections
import dataclasses
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


def moved_shards(old: Seq[int], new: Seq[int]) -> int:
    """Vshards whose device changes: each costs one block per page."""
    return sum(a != b for a, b in zip(old, new, strict=True))


def plan_moves(sequences: Seq[tuple[Sequence, Seq[int]]], hosts: Seq[Host], pool: KvPool) -> Moves:
    """Assigns sequences to instances and takes the blocks that they need there.

    Longest first, each sequence goes where the fewest bytes must move among the instances that have room and are not
    fuller than balance allows: an instance takes its share by TP of all sequences, rounded up.

    Args:
      sequences: with the device of every vshard that they lie on now.
      hosts: the new instances.
      pool: target blocks are taken from it, and every table is rewritten to them; the source blocks stay taken until
        `freed` is given back.  Pages that were taken in advance are taken there too, but not copied.

    Returns:
      What to copy and to free.  A sequence without room keeps its old table.
    """
    moves = Moves([None] * len(sequences), {}, {})
    whole = sum(host.tp for host in hosts)
    share = [-(-len(sequences) * host.tp // whole) for host in hosts] if hosts else []
    counts = [0] * len(hosts)
    order = sorted(range(len(sequences)), key=lambda i: (-sequences[i][0].pages, i))
    for index in order:
        sequence, old = sequences[index]
        candidates = sorted(
            range(len(hosts)),
            key=lambda h: (counts[h] >= share[h], moved_shards(old, hosts[h].device_of), counts[h] / hosts[h].tp, h),
        )
        for h in candidates:
            host = hosts[h]
            if counts[h] < host.rows and _room(pool, sequence.pages, old, host.device_of):
                counts[h] += 1
                moves.assigned[index] = h
                _remap(sequence, old, host.device_of, pool, moves)
                break
    return moves


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


def written_pages(sequence: Sequence, pool: KvPool) -> int:
    """Pages of a sequence that hold keys and values already; those behind them were only taken in advance."""
    return min(sequence.pages, -(-sequence.cached // pool.shape.page_size))


def _remap(sequence: Sequence, old: Seq[int], new: Seq[int], pool: KvPool, moves: Moves) -> None:
    written = written_pages(sequence, pool)
    for vshard, (source, target) in enumerate(zip(old, new, strict=True)):
        if source == target or not sequence.pages:
            continue
        there = sequence.table[vshard, : sequence.pages].copy()
        here = pool.allocators[target].take(sequence.pages)
        sequence.table[vshard, : sequence.pages] = here
        if written:
            sources, targets = moves.blocks.setdefault((source, target), ([], []))
            sources.append(there[:written])
            targets.append(here[:written])
        moves.freed.setdefault(source, []).append(there)
