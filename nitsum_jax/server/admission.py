"""The engine's waiting queue with the policy of control: tiers with deadlines, least slack first."""

from collections.abc import Callable

from nitsum_jax.control.queue import WaitingQueue
from nitsum_jax.control.tiers import TierSet


class TieredQueue:
    """A `WaitingQueue` for an engine, which knows tiers by their names; see `engine.waiting.AdmissionQueue`."""

    def __init__(self, tiers: TierSet, capacity: int, admitted: Callable[[str, float], None] | None = None):
        """Makes an empty queue.

        Args:
          tiers: those that requests may name.
          capacity: most requests that may wait.
          admitted: told id and time of every request that an instance takes, on the engine's thread.
        """
        self._admitted = admitted
        self._tiers = tiers
        self._queue = WaitingQueue(capacity)

    @property
    def capacity(self) -> int:
        """Most requests that may wait."""
        return self._queue.capacity

    def __len__(self) -> int:
        return len(self._queue)

    def push(self, request_id: str, tier: str, arrival_s: float, prompt_tokens: int) -> None:
        """Adds a request.

        Raises:
          InvalidInputError: the tier is not known.
          OverloadedError: the queue is full.
        """
        self._queue.push(request_id, self._tiers.get(tier), arrival_s, prompt_tokens)

    def peek(self, now_s: float) -> str | None:
        """The request that should be next."""
        waiting = self._queue.peek(now_s)
        return None if waiting is None else waiting.id

    def admit(self, request_id: str, now_s: float) -> None:
        """Takes a request out because an instance takes it."""
        waiting = self._queue.peek(now_s)
        if waiting is not None and waiting.id == request_id:
            self._queue.pop_next(now_s)  # keeps count for its rule against starving
        else:  # a more urgent one has just come
            self._queue.remove(request_id)
        if self._admitted is not None:
            self._admitted(request_id, now_s)

    def remove(self, request_id: str) -> bool:
        """Takes a request out because it ended; returns whether it was there."""
        return self._queue.remove(request_id)
