"""Seating sequences at instances, and taking the blocks of some for others when they run out.

Which request goes where is the policy's choice; what is possible is known here.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence

from nitsum_jax.engine.batching.allowed import MaskMaker
from nitsum_jax.engine.batching.wide_prefill import WidePrefill
from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.kv.prefix_cache import Prefix
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, SeatTest, leave_instance, takes_decodes, takes_prompts
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.meshes.layout import Role

Finish = Callable[[LiveRequest, FinishReason, str | None], None]


@dataclasses.dataclass
class Counters:
    """What the loop has done so far; written by its thread, read by any."""

    tokens: int = 0
    steps: int = 0
    switches: int = 0
    sent_back: int = 0
    wide_prefills: int = 0
    broken_logits: int = 0


class Admission:
    """Seats sequences at instances; used by the engine's thread alone."""

    def __init__(
        self,
        cell: Cell,
        policy: Policy,
        lock: threading.Lock,
        counters: Counters,
        wide: WidePrefill,
        masks: MaskMaker,
        finish: Finish,
        *,
        deterministic: bool,
    ):
        """Begins with no sequence sent back.

        Args:
          cell: whose pool it is.
          policy: chooses.
          lock: guards what of the policy other threads use: `push`.
          counters: of the loop.
          wide: takes long prompts, if the cell is configured so.
          masks: makes what sequences may say next.
          finish: ends a sequence that cannot be served.
          deterministic: reserve all blocks of a sequence at once, and recompute outputs token by token.
        """
        self._cell = cell
        self._policy = policy
        self._lock = lock
        self._counters = counters
        self._wide = wide
        self._masks = masks
        self._finish = finish
        self._deterministic = deterministic
        self._test = SeatTest(self._fits, self._held)
        self._admissions = 0

    def admit(self, instances: Sequence[Instance], now_s: float, *, switching: bool) -> None:
        """Seats as many as the policy has seated now.

        Args:
          instances: of the layout in force.
          now_s: the time.
          switching: whether another layout is due, which may have more room and other neighbours.
        """
        with self._lock:
            arrived = self._policy.arrivals(now_s)
        if not switching:
            for sequence in arrived:
                self._refuse_if_hopeless(sequence, instances)
        while (choice := self._policy.next(instances, self._test, now_s)) is not None:
            sequence, instance = choice
            prefix = self._prefix(sequence)
            known = 0 if prefix is None else len(prefix) * self._cell.program.pool.page_size
            pages = self._pages(sequence, instance)
            wide = None if switching else self._wide.admit(sequence, pages, instances, known)
            if wide is not None:
                self._counters.wide_prefills += 1
            self._seat(sequence, wide or instance, prefix, instances, now_s)

    def refuse_hopeless(self, instances: Sequence[Instance]) -> None:
        """Ends waiting requests for which no instance has room even when empty; after a change of layout."""
        with self._lock:
            waiting = list(self._policy.waiting())
        for sequence in waiting:
            self._refuse_if_hopeless(sequence, instances)

    def _refuse_if_hopeless(self, sequence: LiveRequest, instances: Sequence[Instance]) -> None:
        most = 0
        for instance in instances:
            if takes_decodes(instance) and instance.total_pages() > most:
                most = instance.total_pages()
        prompts = max((i.total_pages() for i in instances if takes_prompts(i)), default=0)
        page_size = self._cell.program.pool.page_size
        whole = -(-(sequence.limit if self._deterministic else len(sequence.tokens) + 1) // page_size)
        if not instances or any(instance.broken for instance in instances):
            return
        pages = -(-len(sequence.tokens) // page_size)
        if whole > most or pages > prompts:
            self.drop(sequence)
            self._finish(sequence, FinishReason.ERROR, f"needs {whole} KV pages, more than an instance has")

    def make_room(self, instance: Instance, sequence: LiveRequest, tokens: int) -> bool:
        """Gives a sequence pages for so many tokens; if there are too few, others that the policy names lose theirs.

        Returns:
          False if the sequence itself had to go.
        """
        while not instance.grow(sequence, tokens):
            victim = self._policy.victim(instance)
            if victim is sequence and len(instance.rows) == 1:
                self._finish(sequence, FinishReason.ERROR, "its KV cache outgrew the instance: lower max_tokens")
                return False
            self._send_back(victim)
            if victim is sequence:
                return False
        return True

    def await_again(self, sequence: LiveRequest) -> None:
        """Has a sequence that lost its blocks admitted again."""
        sequence.start_over(again=self._deterministic)
        if self._deterministic and sequence.allowed is not None:
            restart = sequence.allowed.restart()
            if restart is not None:
                self._masks.follow(sequence.allowed, restart)
        self._policy.again(sequence)

    def drop(self, sequence: LiveRequest) -> None:
        """Takes a sequence out of whatever it waits in, if it does."""
        with self._lock:
            self._policy.remove(sequence)

    def _send_back(self, sequence: LiveRequest) -> None:
        """Frees a sequence's blocks; it keeps its tokens and is computed again later."""
        leave_instance(sequence, self._policy)
        self._counters.sent_back += 1
        if not sequence.pending:
            self.await_again(sequence)

    def _fits(self, sequence: LiveRequest, instance: Instance) -> bool:
        if not instance.free_rows:
            return False
        missing = self._pages(sequence, instance) - instance.free_pages()
        if missing <= 0:
            return True
        prefix, prefixes = self._prefix(sequence), self._cell.prefixes
        if not prefix or prefixes is None or instance.broken:
            return False
        return prefixes.in_use(prefix, instance.device_of) >= missing  # these cost no free block

    def _held(self, sequence: LiveRequest, instance: Instance) -> int:
        prefix, prefixes = self._prefix(sequence), self._cell.prefixes
        if not prefix or prefixes is None or instance.broken:
            return 0
        return prefixes.here(prefix, instance.device_of)

    def _prefix(self, sequence: LiveRequest) -> Prefix | None:
        if self._cell.prefixes is None or sequence.counts_every_token:
            return None
        return self._cell.prefixes.find(sequence)

    def _seat(
        self,
        sequence: LiveRequest,
        instance: Instance,
        prefix: Prefix | None,
        instances: Sequence[Instance],
        now_s: float,
    ) -> None:
        sequence.readmitted = sequence.admitted >= 0
        if self._cell.prefixes is not None and prefix is not None:
            self._cell.prefixes.begin(sequence, prefix, instance, instances)
        if not instance.grow(sequence, self._pages(sequence, instance) * self._cell.program.pool.page_size):
            raise AssertionError("pages were counted as free and are not")
        sequence.admitted = self._admissions
        self._admissions += 1
        instance.join(sequence)
        self._policy.seated(sequence, instance, now_s)

    def _pages(self, sequence: LiveRequest, instance: Instance) -> int:
        """Pages that a sequence takes at its admission."""
        # In deterministic mode none may be sent back for lack of blocks; one to decode elsewhere waits for room there.
        whole = self._deterministic and instance.spec.role != Role.PREFILL
        tokens = sequence.limit if whole else len(sequence.tokens) + 1
        return -(-tokens // self._cell.program.pool.page_size)
