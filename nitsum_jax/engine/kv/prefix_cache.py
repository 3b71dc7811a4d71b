"""Prompts that begin alike share the KV blocks of their beginning: what is there is neither computed nor copied.

Full pages are entered in the index (`prefix_index`) as soon as the step that fills them is launched: whoever uses them
is launched behind it.  A sequence begins behind the pages that are found, always at least one token before its end, so
that a step remains which chooses the next token.  Nobody writes to a shared page: writing begins behind it.

Where a page lies on other devices than those of the instance, as after a switch, just its missing blocks are copied.

In deterministic mode keys and values must come from steps of the same shape over the same tokens.  There only whole
prefill chunks of prompts are shared (`granule`), which every prompt computes alike.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nitsum_jax.engine.kv.kv_pool import KvPool
from nitsum_jax.engine.kv.prefix_index import PrefixIndex, extend_keys
from nitsum_jax.engine.kv.transfer import Mover
from nitsum_jax.engine.live_request import LiveRequest


class PoolHolder(Protocol):
    """The holder of the pools of some devices, such as an `Instance`."""

    # ruff: noqa: D102
    @property
    def broken(self) -> bool: ...
    @property
    def order(self) -> Sequence[int]: ...
    @property
    def device_of(self) -> Sequence[int]: ...
    def lend_pool(self) -> None: ...
    def regain_pool(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Pages of a sequence that are in the index.

    Attributes:
      pages: their numbers there, i32[n].
    """

    pages: np.ndarray

    def __len__(self) -> int:
        return len(self.pages)


class PrefixCache:
    """Finds, shares and enters pages; used by the engine's thread alone."""

    least_copied_tokens = 32  # fewer are computed sooner than copied

    def __init__(self, pool: KvPool, mover: Mover, *, granule: int, prompts_only: bool):
        """Begins empty.

        Args:
          pool: with an index.
          mover: copies its blocks, behind the steps in flight.
          granule: tokens, a multiple of the page size: prefixes are shared in multiples of so many.
          prompts_only: whether what decode steps made is not shared.
        """
        if pool.index is None or granule % pool.shape.page_size:
            raise ValueError("the pool has no index, or the granule is not a multiple of its pages")
        self._pool = pool
        self._index: PrefixIndex = pool.index
        self._mover = mover
        self._granule = granule
        self._prompts_only = prompts_only
        self.queried_tokens = 0
        self.hit_tokens = 0

    def find(self, sequence: LiveRequest) -> Prefix:
        """What is known of a sequence's beginning, wherever it lies."""
        return Prefix(self._index.find(self._keys(sequence)))

    def here(self, prefix: Prefix, devices: Sequence[int]) -> int:
        """How many of its pages, from the first, an instance with its vshards on `devices` has."""
        return self._leading(self._index.blocks(prefix.pages, np.array(devices)) >= 0)

    def in_use(self, prefix: Prefix, devices: Sequence[int]) -> int:
        """As `here`, but only pages that others use: they cost no free block."""
        if not len(prefix):
            return 0
        blocks = self._index.blocks(prefix.pages, np.array(devices))
        used = blocks >= 0
        for vshard, device in enumerate(devices):
            used[vshard] &= self._pool.allocators[device].users(blocks[vshard]) > 0
        return self._leading(used)

    def begin(
        self, sequence: LiveRequest, prefix: Prefix, home: "PoolHolder", instances: Sequence["PoolHolder"]
    ) -> None:
        """Gives a sequence without pages those of a prefix, copying what lies elsewhere if that is worth while.

        Args:
          sequence: about to join `home`, which has room for all of its pages.
          prefix: from `find`, a moment ago.
          home: the instance.
          instances: those that hold pools of the cell.
        """
        if not sequence.readmitted:
            self.queried_tokens += len(sequence.tokens)
        self._pool.tick()
        if home.broken or not len(prefix):
            return
        devices = np.array(home.device_of)
        blocks = self._index.blocks(prefix.pages, devices)
        count = self._leading(blocks >= 0)
        if not any(instance.broken for instance in instances):
            sources = self._index.sources(prefix.pages)
            reach = self._leading(sources >= 0)
            worth = (reach - count) * self._pool.shape.page_size >= self.least_copied_tokens
            if worth and self._room_to_fetch(prefix.pages[:reach], blocks[:, :reach], devices, sources[:, :reach]):
                self._share(sequence, blocks[:, :reach], devices)
                self._fetch(sequence, prefix.pages[:reach], devices, sources[:, :reach], instances)
                self._begun(sequence, reach)
                return
        self._share(sequence, blocks[:, :count], devices)
        self._begun(sequence, count)

    def catch_up(self, sequence: LiveRequest, devices: Sequence[int]) -> None:
        """Before a chunk of a prompt: takes over what others have computed since, in the place of its own pages.

        A burst of requests with one beginning is admitted at once; the first computes it for all.
        """
        size = self._pool.shape.page_size
        done = sequence.cached // size
        if sequence.cached != self._whole(sequence.cached):
            return
        where = np.array(devices)
        blocks = self._index.blocks(self._index.find(self._keys(sequence)[done:]), where)
        blocks = blocks[:, : self._leading(blocks >= 0)]
        if not blocks.shape[1]:
            return
        own = min(blocks.shape[1], sequence.pages - done)
        for vshard, device in enumerate(devices):
            self._pool.allocators[device].give(sequence.page_table[vshard, done : done + own])
        self._share(sequence, blocks, where, done)
        count = done + blocks.shape[1]
        self._hit(sequence, (count - done) * size)
        sequence.found(count * size)
        sequence.entered = count
        sequence.pages = max(sequence.pages, count)

    def enter(self, sequence: LiveRequest, devices: Sequence[int]) -> None:
        """Enters the pages that dispatched steps have filled with tokens that are known."""
        size = self._pool.shape.page_size
        tokens = min(sequence.cached, len(sequence.tokens))
        if self._prompts_only:
            tokens = self._whole(min(tokens, sequence.prompt_len))
        full = tokens // size
        if full <= sequence.entered:
            return
        extend_keys(sequence.keys, sequence.tokens, size)
        new = slice(sequence.entered, full)
        self._index.add(sequence.keys[new], np.array(devices), sequence.page_table[:, new])
        sequence.entered = full

    def disown(self, sequence: LiveRequest) -> None:
        """The contents of a sequence's pages are wrong: they must not be found on any device."""
        pages = self._index.find(sequence.keys)
        for device, allocator in enumerate(self._pool.allocators):
            blocks = self._index.blocks(pages, np.full(len(self._index.vshards), device))
            allocator.forget(np.unique(blocks[blocks >= 0]))

    def latest_keys(self, most: int) -> frozenset[bytes]:
        """Keys of so many pages that are there somewhere, those that came last."""
        return frozenset(self._index.latest_keys(most))

    def forget(self, devices: Sequence[int]) -> None:
        """What lies on these devices is not to be trusted any more."""
        for device in devices:
            self._pool.allocators[device].forget()

    def _keys(self, sequence: LiveRequest) -> list[bytes]:
        """Of the pages that may be shared: a token must be left to compute."""
        size = self._pool.shape.page_size
        extend_keys(sequence.keys, sequence.tokens, size)
        tokens = min(len(sequence.tokens), sequence.prompt_len) if self._prompts_only else len(sequence.tokens)
        return sequence.keys[: self._whole(tokens - 1) // size]

    def _whole(self, tokens: int) -> int:
        return tokens // self._granule * self._granule

    def _leading(self, good: np.ndarray) -> int:
        """Pages, from the first, that are good for every vshard: bool[K, n]; in whole granules."""
        every = np.asarray(good.all(axis=0))
        count = every.size if every.all() else int(every.argmin())
        size = self._pool.shape.page_size
        return self._whole(count * size) // size

    def _share(self, sequence: LiveRequest, blocks: np.ndarray, devices: np.ndarray, first: int = 0) -> None:
        """Puts blocks i32[K, n] in the table from page `first` on, with one user more; -1 stays to be filled."""
        for vshard, device in enumerate(devices.tolist()):
            there = blocks[vshard]
            self._pool.allocators[device].share(there[there >= 0])
            sequence.page_table[vshard, first : first + len(there)] = there

    def _begun(self, sequence: LiveRequest, pages: int) -> None:
        tokens = pages * self._pool.shape.page_size
        sequence.pages = sequence.entered = pages
        sequence.found(tokens)
        self._hit(sequence, tokens)

    def _hit(self, sequence: LiveRequest, tokens: int) -> None:
        """Counts what need not be computed; what a sequence finds of its own, when it is computed again, is no hit."""
        if not sequence.readmitted:
            self.hit_tokens += tokens
            sequence.shared += tokens

    def _room_to_fetch(self, pages: np.ndarray, blocks: np.ndarray, devices: np.ndarray, sources: np.ndarray) -> bool:
        """Whether there are free blocks for what must be copied while all that is read is kept."""
        needed: collections.Counter[int] = collections.Counter()
        for vshard, device in enumerate(devices.tolist()):
            missing = blocks[vshard] < 0
            needed[device] += int(np.count_nonzero(missing)) + self._idle(device, blocks[vshard][~missing])
            for source in np.unique(sources[vshard, missing]).tolist():
                which = pages[missing & (sources[vshard] == source)]
                old = self._index.blocks(which, np.full(len(devices), source))[vshard]
                needed[source] += self._idle(source, old)
        return all(self._pool.allocators[device].free >= count for device, count in needed.items())

    def _idle(self, device: int, blocks: np.ndarray) -> int:
        return int(np.count_nonzero(self._pool.allocators[device].users(blocks) == 0))

    def _fetch(
        self,
        sequence: LiveRequest,
        pages: np.ndarray,
        devices: np.ndarray,
        sources: np.ndarray,
        instances: Sequence["PoolHolder"],
    ) -> None:
        """Copies to an instance what its devices lack of i32[n] pages; `sources`: i32[K, n], devices that have it."""
        pool, allocators = self._pool, self._pool.allocators
        copies: dict[tuple[int, int], list[tuple[int, np.ndarray, np.ndarray]]] = {}
        held: list[tuple[int, np.ndarray]] = []
        # First all that is to be read gets a user: what is taken below must not evict it.
        for vshard in range(len(devices)):
            missing = np.flatnonzero(sequence.page_table[vshard, : len(pages)] < 0)
            for source in np.unique(sources[vshard, missing]).tolist():
                which = missing[sources[vshard, missing] == source]
                old = self._index.blocks(pages[which], np.full(len(devices), source))[vshard]
                allocators[source].share(old)
                held.append((source, old))
                copies.setdefault((source, int(devices[vshard])), []).append((vshard, which, old))
        moves = []
        for (source, target), parts in copies.items():
            for vshard, which, old in parts:
                new = allocators[target].take(len(which))
                sequence.page_table[vshard, which] = new
                pool.copied(vshard, source, old, target, new)
                moves.append((source, target, old, new))
        involved = {device for source, target, *_ in moves for device in (source, target)}
        lenders = [instance for instance in instances if involved.intersection(instance.order)]
        for lender in lenders:
            lender.lend_pool()
        try:
            for source, target, old, new in moves:
                self._mover.move(source, target, old, new)
        finally:
            for lender in lenders:
                lender.regain_pool()
        for source, old in held:
            allocators[source].give(old)
