"""What the engine asks a policy, and what it tells it.

The engine knows how: blocks, rows, steps, copies.  A policy knows who and when: which request an instance takes,
whether its next step works on a prompt and how far, where a prompt that is done goes on, where a switch puts whom, who
is sent back when blocks run out.
All calls but `push` come on the engine's thread, between launches, so they must be short and must not wait.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.switching.migration import Destination, Leaving, SeatsLeft
from nitsum_jax.meshes.layout import Role


@dataclasses.dataclass(frozen=True, slots=True)
class Room:
    """What the engine knows of an instance before it seats a sequence there.

    Attributes:
      fits: whether a sequence has room in an instance.
      held: pages of its prompt that lie there already.
    """

    fits: Callable[[LiveRequest, Instance], bool]
    held: Callable[[LiveRequest, Instance], int]


class Policy(Protocol):
    """Decides for one engine; see `waiting.FifoPolicy` for the plainest one.  Times are those of time.monotonic."""

    # ruff: noqa: D102
    @property
    def capacity(self) -> int:
        """Most requests that may wait."""

    def __len__(self) -> int:
        """Requests that no instance has taken yet."""

    def push(self, sequence: LiveRequest) -> None:
        """Adds a request; on any thread, guarded by the engine's lock.

        Raises:
          OverloadedError: as many as may wait do.
        """

    def arrivals(self, now_s: float) -> Sequence[LiveRequest]:
        """What came since the last call; from now on `next` may choose it."""

    def waiting(self) -> Iterable[LiveRequest]:
        """All that wait, in any order, those that were sent back too."""

    def next(self, instances: Sequence[Instance], room: Room, now_s: float) -> tuple[LiveRequest, Instance] | None:
        """Who is to be seated next, and where; it does not wait any more.

        Args:
          instances: of the layout in force.
          room: asked whether a sequence has room.
          now_s: the time.
        """

    def again(self, sequence: LiveRequest) -> None:
        """A sequence lost its blocks and waits to be computed anew."""

    def remove(self, sequence: LiveRequest) -> None:
        """A sequence that may wait has ended; nothing happens if it does not wait."""

    def prefill(self, instance: Instance) -> PrefillChoice | None:
        """What the next step of an instance prefills; None: it decodes.

        If nobody there decodes and there are prompts, one must be chosen.
        """

    def decode_at(self, sequence: LiveRequest, instances: Sequence[Instance], now_s: float) -> Instance | None:
        """Which of these instances, all with room, takes over a sequence whose prompt is done; None: none yet."""

    def place(
        self, sequences: Sequence[Leaving], hosts: Sequence[Destination], room: Callable[[], SeatsLeft]
    ) -> list[int | None]:
        """Which new instance of a switch takes each sequence of those that go; None: it is computed anew.

        Args:
          sequences: that travel.
          hosts: instances that come; those that stay take nobody.
          room: begins to count what is free; only where a sequence fits may it go.
        """

    def victim(self, instance: Instance) -> LiveRequest:
        """Who in an instance gives up its blocks for others."""

    def seated(self, sequence: LiveRequest, instance: Instance, now_s: float) -> None: ...
    def moved(self, sequence: LiveRequest, source: Instance, target: Instance) -> None:
        """A sequence decodes in another instance from now on."""

    def left(self, sequence: LiveRequest, instance: Instance) -> None:
        """A sequence is in this instance no more: it ended, or was sent back."""

    def launched(self, instance: Instance, step: Step, now_s: float) -> None: ...
    def settled(self, instance: Instance, step: Step, now_s: float) -> None:
        """The results of a step have been taken in."""

    def first_token(self, sequence: LiveRequest, now_s: float) -> None: ...
    def ended(self, sequence: LiveRequest, now_s: float) -> None: ...
    def relaid(self, instances: Sequence[Instance], now_s: float) -> None:
        """Other instances are in force; sequences are where `Instance.rows` says."""

    def wake_s(self) -> float | None:
        """When `next` is worth another call even if nothing happens; None: never."""


def takes_prompts(instance: Instance) -> bool:
    """Whether new requests may be seated there."""
    return instance.spec.role != Role.DECODE and not instance.broken


def takes_decodes(instance: Instance) -> bool:
    """Whether sequences stay there when their prompt is done."""
    return instance.spec.role != Role.PREFILL and not instance.broken


def leave_instance(sequence: LiveRequest, policy: Policy) -> None:
    """Takes a sequence out of the instance that it is in, if it is in one, and tells the policy."""
    home = sequence.home
    if home is not None:
        assert isinstance(home, Instance)
        home.leave(sequence)
        policy.left(sequence, home)
