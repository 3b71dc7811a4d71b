"""The queue in front of the instances, as the engine sees it.  Which request is next is policy, decided elsewhere."""

import collections
from typing import Protocol

from nitsum_jax.errors import OverloadedError


class AdmissionQueue(Protocol):
    """A bounded queue of request ids; the engine guards it with a lock, and times are those of time.monotonic."""

    @property
    def capacity(self) -> int:
        """Most requests that may wait."""

    def __len__(self) -> int: ...

    def push(self, request_id: str, tier: str, arrival_s: float, prompt_tokens: int) -> None:
        """Adds a request.

        Raises:
          OverloadedError: the queue is full.
        """

    def peek(self, now_s: float) -> str | None:
        """The request that should be next."""

    def admit(self, request_id: str, now_s: float) -> None:
        """Takes a request out because an instance takes it."""

    def remove(self, request_id: str) -> bool:
        """Takes a request out because it ended; returns whether it was there."""


class FifoQueue:
    """First come, first served."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._ids: collections.OrderedDict[str, None] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._ids)

    def push(self, request_id: str, tier: str, arrival_s: float, prompt_tokens: int) -> None:
        """Adds a request; see `AdmissionQueue`."""
        del tier, arrival_s, prompt_tokens
        if len(self._ids) >= self.capacity:
            raise OverloadedError(f"{self.capacity} requests wait already: try again later, or raise --max_queue")
        self._ids[request_id] = None

    def peek(self, now_s: float) -> str | None:
        """The oldest."""
        del now_s
        return next(iter(self._ids), None)

    def admit(self, request_id: str, now_s: float) -> None:
        """Takes a request out because an instance takes it."""
        del now_s
        self.remove(request_id)

    def remove(self, request_id: str) -> bool:
        """Takes a request out because it ended; returns whether it was there."""
        return self._ids.pop(request_id, self) is None
