"""Which waiting sequence goes to which instance, and who must give its blocks up when they run out."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.prefix_cache import Prefix
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.engine.sequence import Sequence
from nitsum_jax.engine.waiting import AdmissionQueue
from nitsum_jax.engine.wide_prefill import WidePrefill

Finish = Callable[[Sequence, FinishReason, str | None], None]


@dataclasses.dataclass
class Counters:
    """What the loop has done so far; written by its thread, read by any."""

    tokens: int = 0
    steps: int = 0
    switches: int = 0
    sent_back: int = 0
    wide_prefills: int = 0


class Admission:
    """Seats sequences at instances; used by the engine's thread alone."""

    def __init__(
        self,
        cell: Cell,
        waiting: AdmissionQueue,
        alive: Mapping[str, Sequence],
        lock: threading.Lock,
        counters: Counters,
        wide: WidePrefill,
        finish: Finish,
        *,
        deterministic: bool,
    ):
        """Begins with nobody sent back.

        Args:
          cell: whose pool it is.
          waiting: requests that no instance has taken yet, in an order that is its own.
          alive: all sequences by the id of their request.
          lock: guards `waiting` and `alive`.
          counters: of the loop.
          wide: takes long prompts, if the cell is told so.
          finish: ends a sequence that cannot be served.
          deterministic: reserve all blocks of a sequence at once, and recompute outputs token by token.
        """
        self._cell = cell
        self._waiting = waiting
        self._alive = alive
        self._lock = lock
        self._counters = counters
        self._wide = wide
        self._finish = finish
        self._deterministic = deterministic
        self._returned: collections.deque[Sequence] = collections.deque()
        self._admissions = 0

    def admit(self, instances: Seq[Instance], *, switching: bool) -> None:
        """Seats as many as there is room for, in the order of the queue; those sent back come first.

        Args:
          instances: of the layout in force.
          switching: whether another layout is due, which may have more room and other neighbours.
        """
        while True:
            sequence = self._next()
            if sequence is None:
                return
            pages = self._pages_at_admission(sequence)
            if pages > max((instance.total_pages() for instance in instances), default=0) and not switching:
                self.drop(sequence)
                self._finish(sequence, FinishReason.ERROR, f"needs {pages} KV pages, more than an instance has")
                continue
            prefix = None if self._cell.prefixes is None else self._cell.prefixes.find(sequence)
            known = 0 if prefix is None else len(prefix) * self._cell.program.pool.page_size
            guest = None if switching else self._wide.admit(sequence, pages, instances, known)
            if guest is not None:
                self._counters.wide_prefills += 1
                self._seat(sequence, guest, pages, prefix, instances)
                continue
            fitting = [i for i in instances if i.free_rows and i.free_pages() >= pages - self._pages_in_use(prefix, i)]
            if not fitting:
                return
            load = {i: len(i.rows) / i.spec.tp for i in fitting}
            least = min(load.values())
            # Pages that lie there already are worth a little more load.
            instance = min(
                fitting,
                key=lambda i: (load[i] >= least + 2, -self._pages_here(prefix, i), load[i], -i.free_pages()),
            )
            self._seat(sequence, instance, pages, prefix, instances)

    def _pages_in_use(self, prefix: Prefix | None, instance: Instance) -> int:
        """Pages of a beginning that cost the instance no free block."""
        if prefix is None or self._cell.prefixes is None or instance.broken:
            return 0
        return self._cell.prefixes.in_use(prefix, instance.device_of)

    def _pages_here(self, prefix: Prefix | None, instance: Instance) -> int:
        if not prefix or self._cell.prefixes is None or instance.broken:
            return 0
        return self._cell.prefixes.here(prefix, instance.device_of)

    def make_room(self, instance: Instance, sequence: Sequence, tokens: int) -> bool:
        """Gives a sequence pages for so many tokens, at the cost of those admitted last if need be.

        Returns:
          False if the sequence itself had to go.
        """
        while not instance.grow(sequence, tokens):
            victim = max(instance.rows.values(), key=lambda s: s.admitted)
            if victim is sequence and len(instance.rows) == 1:
                self._finish(sequence, FinishReason.ERROR, "its KV cache outgrew the instance: lower max_tokens")
                return False
            self._send_back(victim)
            if victim is sequence:
                return False
        return True

    def await_again(self, sequence: Sequence) -> None:
        """Has a sequence that lost its blocks admitted again, before those that never were."""
        self._returned.append(sequence)
        self._returned = collections.deque(sorted(self._returned, key=lambda s: s.admitted))

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence out of whatever it waits in, if it does."""
        if sequence in self._returned:
            self._returned.remove(sequence)
            return
        with self._lock:
            self._waiting.remove(sequence.request.id)

    def _send_back(self, sequence: Sequence) -> None:
        """Frees a sequence's blocks; it keeps its tokens and is computed again later."""
        if sequence.home is not None:
            sequence.home.leave(sequence)
        self._counters.sent_back += 1
        if not sequence.pending:
            self.await_again(sequence)

    def _seat(
        self, sequence: Sequence, instance: Instance, pages: int, prefix: Prefix | None, instances: Seq[Instance]
    ) -> None:
        self._take(sequence)
        sequence.start_prefill(again=self._deterministic)
        if self._cell.prefixes is not None and prefix is not None:
            self._cell.prefixes.begin(sequence, prefix, instance, instances)
        if not instance.grow(sequence, pages * self._cell.program.pool.page_size):
            raise AssertionError("pages were counted as free and are not")
        sequence.admitted = self._admissions
        self._admissions += 1
        instance.join(sequence)

    def _pages_at_admission(self, sequence: Sequence) -> int:
        # In deterministic mode nobody may be sent back for want of blocks.
        tokens = sequence.limit if self._deterministic else len(sequence.tokens) + 1
        return -(-tokens // self._cell.program.pool.page_size)

    def _next(self) -> Sequence | None:
        if self._returned:
            return self._returned[0]
        with self._lock:
            name = self._waiting.peek(time.monotonic())
            return None if name is None else self._alive[name]

    def _take(self, sequence: Sequence) -> None:
        if self._returned and self._returned[0] is sequence:
            self._returned.popleft()
            return
        with self._lock:
            self._waiting.admit(sequence.request.id, time.monotonic())
