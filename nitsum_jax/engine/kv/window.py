"""Blocks behind the window of a model that has one in every layer: no later step reads them, so they are given back.

The pages stay in the block table, which the steps, copies and switches of a sequence take whole: there each holds the
first block that is still read, with a user more for each of these pages.  What such a page holds is masked.
"""

from collections.abc import Sequence

import numpy as np

from nitsum_jax.engine.kv.kv_pool import BlockAllocator
from nitsum_jax.engine.live_request import LiveRequest


def give_back(
    sequence: LiveRequest,
    window: int,
    page_size: int,
    allocators: Sequence[BlockAllocator],
    *,
    entered_only: bool,
) -> None:
    """Gives back the blocks of a sequence that its next token does not see.

    Args:
      sequence: all of whose steps so far have been launched, and read them before the next owners write.
      window: tokens that a token sees, itself among them.
      page_size: W.
      allocators: for each virtual shard that of its device.
      entered_only: only of pages that are in the prefix index, which takes others from the table later.
    """
    first = min((sequence.cached + 1 - window) // page_size, sequence.pages - 1)
    if entered_only:
        first = min(first, sequence.entered)
    if first <= sequence.dropped:
        return
    for table, allocator in zip(sequence.page_table, allocators, strict=True):
        allocator.share(table[first : first + 1], first)
        allocator.give(table[:first])
        table[:first] = table[first]
    sequence.dropped = first


def dropped_columns(sequences: Sequence[LiveRequest]) -> np.ndarray:
    """bool[pages of all, one behind the other]: the pages behind the window."""
    return np.concatenate([np.arange(sequence.pages) < sequence.dropped for sequence in sequences])
