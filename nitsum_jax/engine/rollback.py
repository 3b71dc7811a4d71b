"""What a switch would have to undo: the state before it, taken in microseconds, and the way back.

A switch writes only to blocks that it took itself, so the old blocks are whole until it is over.  Going back means:
tables, rows and allocators as they were, and the old instances get their pools again.
"""

import dataclasses
import logging
from collections.abc import Sequence as Seq

import numpy as np

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.sequence import Sequence

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sequence was."""

    sequence: Sequence
    home: Instance
    row: int
    pages: int
    table: np.ndarray


class Snapshot:
    """The cell before a switch."""

    def __init__(self, cell: Cell, gone: Seq[Instance]):
        """Notes where all sequences of the instances `gone` are; those keep them until `commit`."""
        self._cell = cell
        self._gone = gone
        self._allocators = [allocator.state() for allocator in cell.pool.allocators]
        self.places = [
            Place(sequence, instance, row, sequence.pages, sequence.table[:, : sequence.pages].copy())
            for instance in gone
            for row, sequence in instance.rows.items()
        ]

    def restore(self, fresh: Seq[Instance]) -> tuple[list[Instance], list[Sequence], list[int]]:
        """Goes back.

        Args:
          fresh: instances of the new layout that exist already.

        Returns:
          The old instances that live on, the sequences that lost blocks and must be computed anew (their blocks are
          free again), and devices that are lost.
        """
        pool = self._cell.pool
        for instance in fresh:
            instance.release()
        for allocator, state in zip(pool.allocators, self._allocators, strict=True):
            allocator.restore(state)
        for place in self.places:
            sequence = place.sequence
            sequence.row, sequence.home, sequence.pages = place.row, place.home, place.pages
            sequence.table[:, : place.pages] = place.table
        renewed, lost = self._mend()
        victims = []
        for place in self.places:
            if renewed.intersection(place.home.order):
                place.home.leave(place.sequence)
                victims.append(place.sequence)
        alive = []
        for instance in self._gone:
            if lost.intersection(instance.order):
                instance.close()
            else:
                instance.regain_pool()
                alive.append(instance)
        return alive, victims, sorted(lost)

    def _mend(self) -> tuple[set[int], set[int]]:
        """Gives devices whose pool went with a failed copy a new one: (those, those among them that are lost)."""
        renewed: set[int] = set()
        lost: set[int] = set()
        for device in range(len(self._cell.devices)):
            if not self._cell.pool.damaged(device):
                continue
            renewed.add(device)
            try:
                self._cell.pool.renew(device)
            except Exception as error:
                _LOG.error("device %d is lost: %s", device, error)
                lost.add(device)
        return renewed, lost
