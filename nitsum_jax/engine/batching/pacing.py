"""Paced emulation: the whole runtime at the pace of other hardware.

Tokens are real ones of a small model on emulated devices; the time of each step, copy and switch is what a profile
says of the target.  A step starts when it is dispatched, or when the step before it on the same devices ends, and its
results are delivered at its paced end.  A step here has one chunk of limited size; where a step of the target has more,
the first ones take what they add to the decode step that follows or that shares the last one, so that all together take
as long as the one of the target.

An instance has one step in flight, not two: a step that is launched ahead runs at once here, and would settle too
early, by a whole step of the target, which requests take part in it.  What a host does between two steps is part of the
profile's times; so a step that follows another begins when that one is due, not when this machine launches it.

Where this machine is slower than the pace, results come late.  That is counted: a run with too many late steps says
nothing about the target.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.step.dispatched import Chunk, Step
from nitsum_jax.errors import InvalidInputError

# Later than this is late: a share of the step, at least so many seconds.
_TOLERANCE = 0.05
_TOLERANCE_S = 0.002


class StepTimes(Protocol):
    """What the target takes, in its own seconds; `control.model.cost_model.CostModel` is one."""

    # ruff: noqa: D102
    def step_s(
        self, tp: int, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ..., /
    ) -> float: ...
    def transfer_s(self, tokens: int, from_tp: int, to_tp: int, /) -> float: ...
    def switch_s(self, kv_bytes_per_link: float, /) -> float: ...


@dataclasses.dataclass(frozen=True)
class Pace:
    """At whose pace a cell runs.

    Attributes:
      times: of the target.
      name: of the target, for people.
      kv_bytes_per_token: of the target's model, all heads and layers.
      time_scale: seconds here for a second of the target; more than 1 is slow motion, for hosts that cannot keep up.
      late_limit: share of late steps above which a run counts for nothing.
    """

    times: StepTimes
    name: str
    kv_bytes_per_token: int
    time_scale: float = 1.0
    late_limit: float = 0.05

    def __post_init__(self) -> None:
        """Raises InvalidInputError for a scale that is not above 0."""
        if not self.time_scale > 0:
            raise InvalidInputError(f"time_scale={self.time_scale} must be positive")


@dataclasses.dataclass(frozen=True)
class PaceStats:
    """How well the pace was kept.

    Attributes:
      steps: delivered so far.
      late: of these, how many came late.
      worst_s: most that one was late by.
      valid: whether the share of late ones is within the limit.
    """

    steps: int = 0
    late: int = 0
    worst_s: float = 0.0
    valid: bool = True

    @property
    def late_share(self) -> float:
        """Share of late steps."""
        return self.late / self.steps if self.steps else 0.0


@dataclasses.dataclass
class _Round:
    """Chunks that share a step of the target."""

    spans: list[Chunk] = dataclasses.field(default_factory=list)
    last: LiveRequest | None = None
    added_s: float = 0.0  # to the decode step


class _Held(NamedTuple):
    """Results that are not due; the number orders those with the same time."""

    due_s: float
    number: int
    instance: Instance
    step: Step


class Pacer:
    """Says when results are due, and holds them until then; used by the engine's thread alone."""

    def __init__(self, pace: Pace):
        self.pace = pace
        self.steps = 0
        self.late = 0
        self.worst_s = 0.0
        self._free_s: dict[int, float] = {}  # device -> end of the last step on it
        self._rounds: dict[Instance, _Round] = {}
        self._held: list[_Held] = []
        self._arriving: list[float] = []
        self._numbers = itertools.count()
        self._before_s = self._turn_s = math.inf  # when results were asked for the last two times

    def launched(self, instance: Instance, step: Step, now_s: float) -> None:
        """A step was dispatched: settles when it begins and ends."""
        seconds = self._decode_s(instance, step) if step.chunk is None else self._chunk_s(instance, step, step.chunk)
        free_s = max(self._free_s.get(device, 0.0) for device in instance.order)
        # It became free since the last look: a host without delay would have launched it then.
        step.start_s = free_s if free_s > self._before_s else max(now_s, free_s)
        step.paced_s = step.start_s + self.pace.time_scale * seconds
        self._occupy(instance.order, step.paced_s)

    def hold(self, instance: Instance, step: Step, now_s: float) -> bool:
        """Keeps a step's results if they are not due; returns whether."""
        if step.paced_s <= now_s or step.tokens is None:
            return False
        heapq.heappush(self._held, _Held(step.paced_s, next(self._numbers), instance, step))
        return True

    def due(self, now_s: float) -> list[tuple[Instance, Step]]:
        """Results that are due now; called once in every turn."""
        self._before_s, self._turn_s = self._turn_s, now_s
        out = []
        while self._held and self._held[0].due_s <= now_s:
            held = heapq.heappop(self._held)
            out.append((held.instance, held.step))
        while self._arriving and self._arriving[0] <= now_s:
            heapq.heappop(self._arriving)
        return out

    def next_s(self) -> float | None:
        """When something is due next."""
        first = [held.due_s for held in self._held[:1]] + self._arriving[:1]
        return min(first, default=None)

    def delivered(self, step: Step, now_s: float) -> None:
        """A step's results go out."""
        late_s = now_s - step.paced_s
        self.steps += 1
        if late_s > max(_TOLERANCE_S, _TOLERANCE * (step.paced_s - step.start_s)):
            self.late += 1
            self.worst_s = max(self.worst_s, late_s)

    def transferred(self, tokens: int, from_tp: int, to_tp: int, now_s: float) -> float:
        """The KV cache of a sequence is handed over from now on; returns when it is there."""
        end_s = now_s + self.pace.time_scale * self.pace.times.transfer_s(tokens, from_tp, to_tp)
        heapq.heappush(self._arriving, end_s)
        return end_s

    def switched(self, devices: Sequence[int], kv_tokens_per_link: float, now_s: float) -> float:
        """A switch stops these devices; returns for how long, seconds here.

        Args:
          devices: of the new instances.
          kv_tokens_per_link: KV cache over the busiest pair of devices, in tokens with all their heads.
          now_s: the time.
        """
        stall_s = self.pace.time_scale * self.pace.times.switch_s(kv_tokens_per_link * self.pace.kv_bytes_per_token)
        begin_s = max((self._free_s.get(device, 0.0) for device in devices), default=0.0)
        self._occupy(devices, max(now_s, begin_s) + stall_s)
        return stall_s

    def forget(self, instances: Sequence[Instance]) -> None:
        """Only these instances are in force."""
        self._rounds = {instance: r for instance, r in self._rounds.items() if instance in instances}

    def stats(self) -> PaceStats:
        """How well the pace was kept; may be read on any thread."""
        share = self.late / self.steps if self.steps else 0.0
        return PaceStats(self.steps, self.late, self.worst_s, share <= self.pace.late_limit)

    def _occupy(self, devices: Sequence[int], until_s: float) -> None:
        for device in devices:
            self._free_s[device] = until_s

    def _decode_s(self, instance: Instance, step: Step) -> float:
        self._rounds.pop(instance, None)
        return self.pace.times.step_s(instance.spec.tp, step.decoding, step.context)

    def _chunk_s(self, instance: Instance, step: Step, chunk: Chunk) -> float:
        tp, step_s = instance.spec.tp, self.pace.times.step_s
        found = self._rounds.get(instance)
        if found is None or not step.joined:
            found = self._rounds[instance] = _Round()
        if found.last is step.sequences[0]:  # pieces of one chunk, which the buckets here are too small for
            begun = found.spans.pop()
            chunk = Chunk(begun.tokens + chunk.tokens, begun.context)
        found.spans.append(chunk)
        found.last = step.sequences[0]
        if step.decoding:
            del self._rounds[instance]
            return max(0.0, step_s(tp, step.decoding, step.context, found.spans) - found.added_s)
        decoding = [s for s in instance.decodable() if s not in step.sequences]
        count, context = len(decoding), sum(s.cached for s in decoding)
        before_s = found.added_s
        found.added_s = step_s(tp, count, context, found.spans) - (step_s(tp, count, context) if count else 0.0)
        return max(0.0, found.added_s - before_s)
