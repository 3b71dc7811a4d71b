"""Which blocks of a cell hold which pages of text.

A page's *key* is a hash of its tokens and of all tokens before it, so equal keys mean equal keys and values.  Every
virtual shard of a page is a block of its own, on any device; an entry says: the block of this page and virtual shard
on this device is so.  Layouts do not enter.  Hence entries outlive a switch, and an instance finds what lies on its
devices whoever put it there.
"""

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np


def extend_keys(keys: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Appends the keys of the full pages of `tokens` that are not in `keys` yet."""
    for page in range(len(keys), len(tokens) // page_size):
        hasher = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        hasher.update(np.array(tokens[page * page_size : (page + 1) * page_size], np.int32).tobytes())
        keys.append(hasher.digest())


class PrefixIndex:
    """Pages have small numbers here, given when a key first comes and taken back with the last block of the page."""

    def __init__(self, devices: int, vshards: int, blocks: int):
        """Begins empty.

        Args:
          devices: of the cell.
          vshards: K.
          blocks: of one device.
        """
        self.vshards = np.arange(vshards)[:, None]
        capacity = max(1, devices * blocks // vshards)
        self._numbers: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""] * capacity
        self._unused = list(range(capacity - 1, -1, -1))
        self._entries = np.zeros(capacity, np.int32)  # of every page
        self._where = np.full((devices, vshards, capacity), -1, np.int32)
        self._page = np.full((devices, blocks), -1, np.int32)
        self._vshard = np.zeros((devices, blocks), np.int16)

    def __len__(self) -> int:
        """Pages of which some block is there."""
        return len(self._numbers)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """Numbers of the pages with these keys as far as they are known without a gap: i32[n]."""
        found = []
        for key in keys:
            number = self._numbers.get(key)
            if number is None:
                break
            found.append(number)
        return np.array(found, np.int32)

    def latest_keys(self, most: int) -> list[bytes]:
        """Keys of so many pages, those that came last."""
        return list(itertools.islice(reversed(self._numbers), most))

    def blocks(self, pages: np.ndarray, devices: np.ndarray) -> np.ndarray:
        """i32[K, n]: the blocks of i32[n] pages where device i32[K] of every vshard has them, else -1."""
        return np.asarray(self._where[devices[:, None], self.vshards, pages[None, :]])

    def sources(self, pages: np.ndarray) -> np.ndarray:
        """i32[K, n]: some device that has the block of every vshard of i32[n] pages, or -1."""
        there = self._where[:, :, pages] >= 0
        return np.where(there.any(axis=0), there.argmax(axis=0), -1)

    def add(self, keys: Sequence[bytes], devices: np.ndarray, blocks: np.ndarray) -> None:
        """Says which pages lie in blocks i32[K, n] of devices i32[K]; where a device has a page already, that stays."""
        pages = []
        for key in keys:
            number = self._numbers.get(key)
            if number is None:
                if not self._unused:
                    break
                number = self._unused.pop()
                self._numbers[key], self._keys[number] = number, key
            pages.append(number)
        numbers = np.array(pages, np.int32)
        blocks = blocks[:, : len(numbers)]
        owners = np.broadcast_to(devices[:, None], blocks.shape)
        shards = np.broadcast_to(self.vshards, blocks.shape)
        new = (self._where[owners, shards, numbers[None, :]] < 0) & (self._page[owners, blocks] < 0)
        everywhere = np.broadcast_to(numbers[None, :], blocks.shape)[new]
        self._enter(owners[new], shards[new], everywhere, blocks[new])
        self._forget_empty(numbers)

    def twins(self, vshard: int | np.ndarray, source: int, blocks: np.ndarray, target: int) -> np.ndarray:
        """i32[n]: blocks on device `target` that hold the same as blocks i32[n] of `source`, or -1; `vshard` of all or
        of each.
        """
        pages = self._page[source, blocks]
        return np.where(pages >= 0, self._where[target, vshard, pages], -1)

    def copied(self, vshard: int | np.ndarray, source: int, blocks: np.ndarray, target: int, new: np.ndarray) -> None:
        """Blocks i32[n] of `source` are copied to the blocks `new` of `target`; where it has twins, those stay."""
        pages = self._page[source, blocks]
        known = (pages >= 0) & (self._page[target, new] < 0) & (self._where[target, vshard, pages] < 0)
        if not known.any():
            return
        where, first = np.unique(blocks[known], return_index=True)  # the first copy of each counts
        shards = np.broadcast_to(vshard, blocks.shape)[known][first]
        self._enter(np.full(len(where), target), shards, pages[known][first], new[known][first])

    def holds(self, device: int, blocks: np.ndarray) -> np.ndarray:
        """bool[n]: which blocks have an entry."""
        return np.asarray(self._page[device, blocks] >= 0)

    def drop(self, device: int, blocks: np.ndarray) -> None:
        """The entries of these blocks end; those without one are skipped."""
        blocks = blocks[self._page[device, blocks] >= 0]
        pages = self._page[device, blocks]
        self._where[device, self._vshard[device, blocks], pages] = -1
        self._page[device, blocks] = -1
        np.subtract.at(self._entries, pages, 1)
        self._forget_empty(np.unique(pages))

    def drop_device(self, device: int) -> None:
        """All entries of a device end."""
        self.drop(device, np.flatnonzero(self._page[device] >= 0))

    def _enter(self, devices: np.ndarray, vshards: np.ndarray, pages: np.ndarray, blocks: np.ndarray) -> None:
        self._where[devices, vshards, pages] = blocks
        self._page[devices, blocks] = pages
        self._vshard[devices, blocks] = vshards
        np.add.at(self._entries, pages, 1)

    def _forget_empty(self, pages: np.ndarray) -> None:
        for number in pages[self._entries[pages] == 0].tolist():
            if self._keys[number]:
                del self._numbers[self._keys[number]]
                self._keys[number] = b""
                self._unused.append(number)
