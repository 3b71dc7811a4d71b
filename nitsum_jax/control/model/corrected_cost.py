"""A cost model that corrects itself with measured step times.

A profile may be of another machine, or only a rough guess; what it says of how times grow with work is worth more than
the times themselves.  So per TP, and for decoding and prompts apart, the ratio of measured to predicted seconds is
followed by an exponential mean of its logarithm, and predictions are multiplied by it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import Profile

_TRUSTED = 16
"""Measurements after which a single one cannot pull the mean by more than a factor of two any more."""


@dataclasses.dataclass(slots=True)
class _Ratio:
    log: float = 0.0
    count: int = 0

    @property
    def value(self) -> float:
        return math.exp(self.log)

    def add(self, ratio: float, weight: float) -> None:
        step = math.log(ratio) - self.log
        if self.count >= _TRUSTED:
            step = min(max(step, -math.log(2)), math.log(2))
        self.count += 1
        self.log += max(weight, 1 / self.count) * step


class CorrectedCost(CostModel):
    """A `CostModel` whose step times follow what is measured.

    Attributes:
      version: grows when predictions have changed by a tenth since it last grew; what is worked out from predictions
        and kept is stale then.
    """

    def __init__(self, profile: Profile, *, weight: float = 0.05):
        """Begins with what the profile says.

        Args:
          profile: read as by `CostModel`.
          weight: of a new measurement in the mean, once there are many.
        """
        super().__init__(profile)
        self._weight = weight
        self._decode = {tp: _Ratio() for tp in self.tps}
        self._prefill = {tp: _Ratio() for tp in self.tps}
        self._told: dict[tuple[int, bool], float] = {}
        self._ratios: dict[int, tuple[float, float]] = {}  # worked out, until something is learnt

    def observe(
        self, tp: int, seconds: float, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Learns from a step; a TP that the profile does not have is passed over.

        Args:
          tp: TP of the instance.
          seconds: that it took.
          sequences: that decoded; 0 in a step of prompts alone.
          context_tokens: of KV cache that they held together.
          chunks: prefill chunks, each (new tokens, context before them).
        """
        if tp not in self._decode or not seconds > 0:
            return
        if not chunks:
            ratio, predicted = self._decode[tp], super().step_s(tp, sequences, context_tokens)
        else:  # what the chunks add
            ratio = self._prefill[tp]
            alone = super().step_s(tp, sequences, context_tokens)
            predicted = super().step_s(tp, sequences, context_tokens, chunks) - alone
            seconds -= alone * self._decode[tp].value
        if not predicted > 0 or not seconds > 0:
            return
        ratio.add(seconds / predicted, self._weight)
        self._ratios.clear()
        key = tp, bool(chunks)
        if abs(ratio.log - self._told.get(key, 0.0)) > 0.1:
            self._told[key] = ratio.log
            self.version += 1

    def adopt(self, ratios: Mapping[int, tuple[float, float]]) -> None:
        """Takes over what another has learnt: per TP, the ratios of decoding and of prompts."""
        for tp, (decode, prefill) in ratios.items():
            if tp in self._decode:
                self._decode[tp] = _Ratio(math.log(decode), _TRUSTED)
                self._prefill[tp] = _Ratio(math.log(prefill), _TRUSTED)
        self._ratios.clear()

    def learnt(self) -> dict[int, tuple[float, float]]:
        """The ratios of every TP."""
        return {tp: self.ratios(tp) for tp in self.tps}

    def ratios(self, tp: int) -> tuple[float, float]:
        """Measured over predicted seconds of decoding and of prompts; those of the nearest TP that was measured."""
        found = self._ratios.get(tp)
        if found is None:
            found = self._ratios[tp] = self._nearest(self._decode, tp), self._nearest(self._prefill, tp)
        return found

    def step_s(self, tp: int, sequences: int, context_tokens: int, chunks: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of one step; see `CostModel.step_s`."""
        alone = super().step_s(tp, sequences, context_tokens)
        decode, prefill = self.ratios(tp)
        if not chunks:
            return alone * decode
        return alone * decode + (super().step_s(tp, sequences, context_tokens, chunks) - alone) * prefill

    def chunk_line(
        self, tp: int, sequences: int, context_tokens: int, before: int, chunks: Sequence[tuple[int, int]] = ()
    ) -> Callable[[int], float]:
        """step_s over the size of one more prefill chunk; see `CostModel.chunk_line`."""
        line = super().chunk_line(tp, sequences, context_tokens, before, chunks)
        alone = super().step_s(tp, sequences, context_tokens)
        decode, prefill = self.ratios(tp)
        return lambda new: alone * decode + (line(new) - alone) * prefill

    def decode_segment(self, tp: int, sequences: int, context_tokens: int) -> tuple[float, float, int]:
        """The straight piece of step_s that begins at this context; see `CostModel.decode_segment`."""
        seconds, slope, last = super().decode_segment(tp, sequences, context_tokens)
        ratio = self.ratios(tp)[0]
        return seconds * ratio, slope * ratio, last

    def _nearest(self, ratios: dict[int, _Ratio], tp: int) -> float:
        own = ratios.get(tp)
        if own is not None and own.count:
            return own.value
        known = [(abs(math.log2(other / tp)), other) for other, ratio in ratios.items() if ratio.count]
        return ratios[min(known)[1]].value if known else 1.0
