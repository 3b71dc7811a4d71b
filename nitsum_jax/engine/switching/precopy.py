"""Copying KV blocks ahead of a switch, while the sequences still decode.

A page that is full is never written again, so it can be copied to where the next layout will want it, some blocks
behind each step.  What is left for the switch itself are the pages written since: a page or two per sequence and
vshard, however long the context.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.history import is_ready
from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.transfer import PIECES
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.switching.migration import Ahead, Destination, Leaving, Seats, choose_destinations

# A round copies this many blocks per pair of devices; it must not hold a step up for long.
ROUND_BLOCKS = 4 * PIECES[0]
# When copying cannot keep up with what is written, the switch begins all the same.
LONGEST_S = 30.0


@dataclasses.dataclass
class _CopyPlan:
    """A sequence, where it is, where it goes, and how far its copies have come."""

    sequence: LiveRequest
    home: Instance
    ahead: Ahead


class _Taken:
    """Takes blocks for copies, none that a step in flight may still write.

    Blocks are free as soon as their sequence has ended, with steps of it in flight: the next owner writes to them in
    a later step.  Copies that go past the steps must not.
    """

    def __init__(self, pool: KvPool, running: Sequence[Instance]):
        """Looks at the steps in flight.

        Args:
          pool: blocks are taken from it.
          running: instances whose steps the copies go past; none if they queue behind them.
        """
        self._pool = pool
        self._busy: dict[int, np.ndarray] = {}
        self._barred: dict[int, int] = {}  # how many of the busy blocks are free; only others are taken
        for instance in running:
            for device in instance.order:
                busy = self._busy.setdefault(device, np.zeros(pool.shape.blocks, bool))
                for blocks in instance.touched(device):
                    busy[blocks] = True

    def free(self, device: int) -> int:
        """Blocks that can be taken, at the least."""
        allocator, busy = self._pool.allocators[device], self._busy.get(device)
        if busy is not None and device not in self._barred:
            self._barred[device] = int(np.count_nonzero(allocator.users(np.flatnonzero(busy)) == 0))
        return allocator.free - self._barred.get(device, 0)

    def take(self, device: int) -> np.ndarray:
        """One block, i32[1]; there must be one."""
        allocator, busy = self._pool.allocators[device], self._busy.get(device)
        aside = []
        while busy is not None and busy[(block := allocator.take(1))[0]]:
            aside.append(block)
        if busy is None:
            block = allocator.take(1)
        for other in reversed(aside):
            allocator.give(other)
        return block


class PreCopy:
    """The copies for one switch; used by the engine's thread alone."""

    def __init__(self, cell: Cell, leaving: Iterable[Instance], destinations: Sequence[Destination], seats: Seats):
        """Assigns the sequences to their new instances; copies nothing yet.

        Args:
          cell: whose pool it is.
          leaving: instances that the switch takes away.
          destinations: instances that it brings.
          seats: decides which sequence goes where.
        """
        self._cell = cell
        self._since = time.monotonic()
        self._flags: list[jax.Array] = []
        pairs = [(s, instance) for instance in leaving for s in instance.rows.values()]
        chosen = choose_destinations(
            [Leaving(s, instance.device_of) for s, instance in pairs], destinations, cell.pool, seats
        )
        self._plans = [
            _CopyPlan(
                s,
                home,
                Ahead(destination, destinations[destination].device_of, s.admitted, np.zeros_like(s.page_table), 0),
            )
            for (s, home), destination in zip(pairs, chosen, strict=True)
            if destination is not None
        ]
        self._places: dict[int, int] = {}
        self.rounds = 0

    def advance(self, instances: Sequence[Instance], guest: Instance | None = None) -> bool:
        """Starts the next round if the last one is over; returns whether the switch may begin.

        Args:
          instances: of the layout in force; pools of theirs are borrowed.
          guest: another one that may have steps in flight on their devices.
        """
        if not all(is_ready(flag) for flag in self._flags):
            return time.monotonic() - self._since > LONGEST_S
        self._release(plan for plan in self._plans if not self._lives(plan))
        self._plans = [plan for plan in self._plans if self._lives(plan)]
        blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
        past = self._cell.switch_mover is not self._cell.mover
        taken = _Taken(self._cell.pool, (*instances, *([] if guest is None else [guest])) if past else ())
        for plan in self._plans:
            self._collect(plan, blocks, taken)
        if not blocks or time.monotonic() - self._since > LONGEST_S:
            return True
        self.rounds += 1
        devices = {device for pair in blocks for device in pair}
        lenders = [instance for instance in instances if devices.intersection(instance.order)]
        for instance in lenders:
            instance.lend_pool()
        try:
            for (source, target), pairs in blocks.items():
                old, new = np.array(pairs, np.int32).T
                copy = self._cell.switch_mover.move(source, target, old, new)
                self._places.setdefault(target, self._cell.switch_mover.place(target))
                if copy.done is not None:
                    self._flags.append(copy.done)
        finally:
            for instance in lenders:
                instance.regain_pool()
        self._flags = [flag for flag in self._flags if not is_ready(flag)]
        return False

    def take(self) -> dict[int, Ahead]:
        """What was copied, by id of the sequence; the blocks then belong to the caller.

        The pools must be given back.
        """
        plans, self._plans = self._plans, []
        if any(self._cell.switch_mover.place(device) != place for device, place in self._places.items()):
            self._release(plans)  # copies went to memory that the pool has left since
            return {}
        self._release(plan for plan in plans if not self._lives(plan))
        return {id(plan.sequence): plan.ahead for plan in plans if self._lives(plan)}

    def give_up(self) -> None:
        """Frees all that was taken."""
        plans, self._plans = self._plans, []
        self._release(plans)

    def _lives(self, plan: _CopyPlan) -> bool:
        # A sequence that was sent back meanwhile is another one now: its pages are written anew.
        sequence = plan.sequence
        return sequence.home is not None and sequence.admitted == plan.ahead.admitted and sequence.finish is None

    def _collect(self, plan: _CopyPlan, blocks: dict[tuple[int, int], list[tuple[int, int]]], taken: "_Taken") -> None:
        """Adds full pages of a sequence, as far as this round has room for them."""
        sequence, ahead, pool = plan.sequence, plan.ahead, self._cell.pool
        old = plan.home.device_of
        moved = [(k, a, b) for k, (a, b) in enumerate(zip(old, ahead.devices, strict=True)) if a != b]
        full = min(sequence.pages, plan.home.settled_tokens(sequence) // pool.shape.page_size)
        while moved and ahead.pages < full:
            if any(len(blocks.get((a, b), ())) >= ROUND_BLOCKS for _, a, b in moved):
                return
            if any(taken.free(b) < len(moved) for _, _, b in moved):
                return
            for vshard, source, target in moved:
                block = sequence.page_table[vshard, ahead.pages : ahead.pages + 1]
                new = pool.reuse(vshard, source, block, target)
                if new[0] < 0:
                    new = taken.take(target)
                    if self._cell.switch_mover is self._cell.mover:
                        # Copies that go past the steps count only when the switch has found them in their place.
                        pool.copied(vshard, source, block, target, new)
                    blocks.setdefault((source, target), []).append((int(block[0]), int(new[0])))
                ahead.page_table[vshard, ahead.pages] = new[0]
            ahead.pages += 1

    def _release(self, plans: Iterable[_CopyPlan]) -> None:
        for plan in plans:
            plan.ahead.release(plan.home.device_of, self._cell.pool)
