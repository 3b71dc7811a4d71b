"""What a switch would have to undo: the state before it, taken in microseconds, and the way back.

A switch writes only to blocks that it took itself, so the old blocks are whole until it is over.  Going back means:
tables, rows and allocators as they were, and the old instances get their pools again.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SavedPlace:
    """Where a sequence was."""

    sequence: LiveRequest
    home: Instance
    row: int
    pages: int
    page_table: np.ndarray


class Restored(NamedTuple):
    """The cell after the way back.

    Attributes:
      alive: the old instances that live on.
      victims: sequences that lost blocks and must be computed anew; their blocks are free again.
      lost: devices that are lost.
    """

    alive: list[Instance]
    victims: list[LiveRequest]
    lost: list[int]


class _Mended(NamedTuple):
    """Devices that got a new pool, and those among them that could not."""

    renewed: set[int]
    lost: set[int]


class CellSnapshot:
    """The cell before a switch."""

    def __init__(self, cell: Cell, gone: Sequence[Instance]):
        """Notes where all sequences of the instances `gone` are; those keep them until `commit`."""
        self._cell = cell
        self._gone = gone
        self._allocators = [allocator.state() for allocator in cell.pool.allocators]
        self.places = [
            SavedPlace(sequence, instance, row, sequence.pages, sequence.page_table[:, : sequence.pages].copy())
            for instance in gone
            for row, sequence in instance.rows.items()
        ]

    def restore(self, fresh: Sequence[Instance]) -> Restored:
        """Goes back.

        Args:
          fresh: instances of the new layout that exist already.
        """
        pool = self._cell.pool
        for instance in fresh:
            instance.release()
        for allocator, state in zip(pool.allocators, self._allocators, strict=True):
            allocator.restore(state)
        for place in self.places:
            sequence = place.sequence
            sequence.row, sequence.home, sequence.pages = place.row, place.home, place.pages
            sequence.page_table[:, : place.pages] = place.page_table
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
        return Restored(alive, victims, sorted(lost))

    def _mend(self) -> _Mended:
        """Gives devices whose pool went with a failed copy a new one."""
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
        return _Mended(renewed, lost)
