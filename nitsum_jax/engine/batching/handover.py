"""A sequence whose prompt is done goes to the instance that decodes it, with its blocks.

The copies are launched behind the last step of the prompt and the steps that run where it goes; neither side stops for
them.  Only blocks whose virtual shard lies on another device there move.  The first token is streamed when it is read,
whether or not the copies are over.
"""

from collections.abc import Sequence

import numpy as np

from nitsum_jax.engine.batching.pacing import Pacer
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, takes_decodes
from nitsum_jax.engine.step.dispatched import IncomingRequest
from nitsum_jax.engine.switching.migration import Destination, Leaving, free, plan_moves


def move_sequence(
    cell: Cell, sequence: LiveRequest, source: Instance, target: Instance, lenders: Sequence[Instance]
) -> bool:
    """Moves a sequence to a running instance; waits for nothing.

    Args:
      cell: of both.
      sequence: all its prompt is in steps that were dispatched, at the least.
      source: where it is.
      target: where it goes.
      lenders: instances that hold the pools of the devices of both.

    Returns:
      False, with nothing changed, if there is no room.
    """
    destination = Destination(target.spec, target.device_of, target.free_rows, target.total_pages(), target.page_size)
    moves = plan_moves([Leaving(sequence, source.device_of)], [destination], cell.pool)
    if moves.assigned[0] is None:
        return False
    for lender in lenders:
        lender.lend_pool()
    try:
        for (here, there), (old, new) in moves.blocks.items():
            cell.mover.move(here, there, np.concatenate(old), np.concatenate(new))
    finally:
        for lender in lenders:
            lender.regain_pool()
    free(moves.freed, cell.pool)
    arrival = IncomingRequest(sequence, source.history, sequence.row)
    del source.rows[sequence.row]
    source.vacate(sequence.row)
    target.receive(arrival, [step for step in source.outstanding if sequence in step.sequences])
    return True


class PrefillHandover:
    """Empties prefill instances; used by the engine's thread alone."""

    def __init__(self, cell: Cell, policy: Policy, pacer: Pacer | None, *, deterministic: bool):
        """Begins with nothing handed over.

        Args:
          cell: of the instances.
          policy: says where sequences go.
          pacer: delays them, in a paced cell.
          deterministic: whether room for the longest output is taken at once.
        """
        self._cell = cell
        self._policy = policy
        self._pacer = pacer
        self._deterministic = deterministic
        self.count = 0

    def advance(self, instances: Sequence[Instance], now_s: float) -> bool:
        """Hands over what can be; returns whether anything was."""
        moved = False
        for source in instances:
            for sequence in source.departing():
                # Where a launch of a copy waits for the steps before it, they are read first.
                if source.broken or (self._cell.drain and sequence.pending):
                    continue
                moved |= self._try(sequence, source, instances, now_s)
        return moved

    def fits(self, sequence: LiveRequest, target: Instance) -> bool:
        """Whether an instance can take over a sequence and go on with it."""
        tokens = sequence.limit if self._deterministic else sequence.cached + 1
        need = max(sequence.pages, target.pages_for(tokens))
        return takes_decodes(target) and target.free_rows > 0 and target.free_pages() >= need

    def _try(self, sequence: LiveRequest, source: Instance, instances: Sequence[Instance], now_s: float) -> bool:
        fitting = [i for i in instances if i.depth and i is not source and self.fits(sequence, i)]
        target = self._policy.decode_at(sequence, fitting, now_s) if fitting else None
        if target is None or not move_sequence(self._cell, sequence, source, target, (source, target)):
            return False
        if self._deterministic and not target.grow(sequence, sequence.limit):
            raise AssertionError("pages were counted as free and are not")
        self.count += 1
        if self._pacer is not None:
            sequence.ready_s = self._pacer.transferred(sequence.cached, source.spec.tp, target.spec.tp, now_s)
        self._policy.moved(sequence, source, target)
        return True
