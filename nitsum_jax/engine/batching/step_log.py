"""How long steps took, reported in batches to a listener."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.step.dispatched import Step

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class StepTiming:
    """A finished step.

    Attributes:
      devices: of the instance.
      tp: of the instance.
      start_s: when it began (time.monotonic): dispatched, or the step before it over.
      end_s: when its results were read, or delivered in a paced cell.
      decode_sequences: that got a token by decoding.
      context_tokens: of KV cache that they held together.
      prefill_tokens: of its chunk, in a list; empty if it only decoded.
      prefill_context: context before the chunk, likewise.
    """

    devices: tuple[int, ...]
    tp: int
    start_s: float
    end_s: float
    decode_sequences: int
    context_tokens: int
    prefill_tokens: tuple[int, ...] = ()
    prefill_context: tuple[int, ...] = ()


StepListener = Callable[[Sequence[StepTiming]], None]


class StepLog:
    """Collects the timings of a turn of the engine's thread for its listeners."""

    def __init__(self) -> None:
        self.listeners: list[StepListener] = []
        self._ends: dict[Instance, float] = {}
        self._timings: list[StepTiming] = []

    def add(self, instance: Instance, step: Step, end_s: float) -> None:
        """A step is over; sets when it began, if a pace has not."""
        if not step.start_s:
            step.start_s = max(step.launched_s, self._ends.get(instance, 0.0))
        self._ends[instance] = end_s
        if not self.listeners:
            return
        chunk = step.chunk
        timing = StepTiming(
            instance.spec.devices,
            instance.spec.tp,
            step.start_s,
            end_s,
            step.decoding,
            step.context,
            () if chunk is None else (chunk.tokens,),
            () if chunk is None else (chunk.context,),
        )
        self._timings.append(timing)

    def keep(self, instances: Sequence[Instance]) -> None:
        """Forgets all other instances."""
        self._ends = {instance: end_s for instance, end_s in self._ends.items() if instance in instances}

    def flush(self) -> None:
        """Tells the listeners."""
        if not self._timings:
            return
        timings, self._timings = self._timings, []
        for listener in self.listeners:
            try:
                listener(timings)
            except Exception:  # a fault in the listener must not stop the streams
                _LOG.exception("a listener of step times failed")
