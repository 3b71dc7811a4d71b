"""What the engine asks a policy, and what it tells a listener.

The engine knows how: blocks, rows, steps, copies.  A policy decides which and when: which request an instance takes,
whether its next step works on a prompt and how far, where a prompt that is done goes on, where a switch puts each
sequence, and which one is sent back when blocks run out.
All calls but `push` come on the engine's thread, between launches, so they must be short and must not wait.
"""

import abc
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import Home, LiveRequest
from nitsum_jax.engine.step.dispatched import PrefillChoice, Step
from nitsum_jax.engine.switching.migration import Destination, Leaving, SeatsLeft
from nitsum_jax.meshes.layout import Role


@dataclasses.dataclass(frozen=True, slots=True)
class SeatTest:
    """What the engine knows of an instance before it seats a sequence there.

    Attributes:
      fits: whether an instance has a row and the blocks for a sequence.
      held: pages of its prompt that lie there already.
    """

    fits: Callable[[LiveRequest, Instance], bool]
    held: Callable[[LiveRequest, Instance], int]


class Listener:
    """Is notified of what has happened; by default it does nothing.  Times are those of time.monotonic."""

    def seated(self, sequence: LiveRequest, instance: Instance, now_s: float) -> None:
        """An instance has taken a sequence, whose prompt is to be computed."""

    def moved(self, sequence: LiveRequest, source: Instance, target: Instance) -> None:
        """A sequence decodes in another instance from now on."""

    def left(self, sequence: LiveRequest, home: Home) -> None:
        """A sequence is in this instance no more: it ended, or was sent back."""

    def launched(self, instance: Instance, step: Step, now_s: float) -> None:
        """A step was started."""

    def settled(self, instance: Instance, step: Step, now_s: float) -> None:
        """The results of a step have been taken in."""

    def first_token(self, sequence: LiveRequest, now_s: float) -> None:
        """The first token of a sequence has been read."""

    def ended(self, sequence: LiveRequest, now_s: float) -> None:
        """A sequence has ended, for whatever reason."""

    def relaid(self, instances: Sequence[Instance], now_s: float) -> None:
        """Other instances are in force; sequences are where `Instance.rows` says."""


class Policy(Listener, abc.ABC):
    """Decides for one engine; see `waiting.FifoPolicy` for the plainest one.  It may listen, too.

    Attributes:
      capacity: most requests that may wait.
    """

    capacity: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Requests that no instance has taken yet."""

    @abc.abstractmethod
    def push(self, sequence: LiveRequest) -> None:
        """Adds a request; on any thread, guarded by the engine's lock.

        Raises:
          OverloadedError: as many as may wait do.
        """

    @abc.abstractmethod
    def arrivals(self, now_s: float) -> Sequence[LiveRequest]:
        """What came since the last call; from now on `next` may choose it."""

    @abc.abstractmethod
    def waiting(self) -> Iterable[LiveRequest]:
        """All that wait, in any order, those that were sent back too."""

    @abc.abstractmethod
    def next(self, instances: Sequence[Instance], test: SeatTest, now_s: float) -> tuple[LiveRequest, Instance] | None:
        """Which sequence is to be seated next, and where; it does not wait any more.

        Args:
          instances: of the layout in force.
          test: asked whether an instance can take a sequence.
          now_s: the time.
        """

    @abc.abstractmethod
    def again(self, sequence: LiveRequest) -> None:
        """A sequence lost its blocks and waits to be computed anew."""

    @abc.abstractmethod
    def remove(self, sequence: LiveRequest) -> None:
        """A sequence that may wait has ended; nothing happens if it does not wait."""

    @abc.abstractmethod
    def prefill(self, instance: Instance) -> PrefillChoice | None:
        """What the next step of an instance prefills; None: it decodes.

        If nobody there decodes and there are prompts, one must be chosen.
        """

    @abc.abstractmethod
    def decode_at(self, sequence: LiveRequest, instances: Sequence[Instance], now_s: float) -> Instance | None:
        """Which of these instances, all with room, takes over a sequence whose prompt is done; None: none yet."""

    @abc.abstractmethod
    def place(
        self, sequences: Sequence[Leaving], hosts: Sequence[Destination], room: Callable[[], SeatsLeft]
    ) -> list[int | None]:
        """Which new instance of a switch takes each sequence of those that go; None: it is computed anew.

        Args:
          sequences: that travel.
          hosts: instances that come; those that stay take nobody.
          room: begins to count what is free; only where a sequence fits may it go.
        """

    @abc.abstractmethod
    def victim(self, instance: Instance) -> LiveRequest:
        """Which sequence of an instance gives up its blocks for others."""

    def wake_s(self) -> float | None:
        """When `next` is worth another call even if nothing happens; None: never."""
        return None


def takes_prompts(instance: Instance) -> bool:
    """Whether new requests may be seated there."""
    return instance.spec.role != Role.DECODE and not instance.broken


def takes_decodes(instance: Instance) -> bool:
    """Whether sequences stay there when their prompt is done."""
    return instance.spec.role != Role.PREFILL and not instance.broken


def leave_instance(sequence: LiveRequest, listener: Listener) -> None:
    """Takes a sequence out of the instance that it is in, if it is in one, and tells of it."""
    home = sequence.home
    if home is not None:
        home.leave(sequence)
        listener.left(sequence, home)
