"""Ways to stretch rotary frequencies to longer contexts: Llama 3 and linear, YaRN, and LongRoPE.

Each says what every frequency is divided by (`divisors`), and what cosines and sines are multiplied by
(`attention_factor`).
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 scaling of the rotary frequencies.

    A frequency f with wavelength w = 2 pi / f becomes f / factor where w > original_max_context / low_freq_factor,
    stays f where w < original_max_context / high_freq_factor, and is interpolated in between with
    s = (original_max_context / w - low_freq_factor) / (high_freq_factor - low_freq_factor):
    (1 - s) * f / factor + s * f.  Clipping s to [0, 1] gives all three cases at once.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int

    @classmethod
    def linear(cls, factor: float, max_context: int) -> "RopeScaling":
        """Plain division of all frequencies by `factor`, in the Llama-3 form.

        Exact: no wavelength is under 2 pi, and these bounds put "scaled in full" at every wavelength over 1.
        """
        return cls(factor, float(max_context), 2.0 * max_context, max_context)

    @property
    def is_linear(self) -> bool:
        """True if made by `linear`: every frequency is divided by the factor."""
        return self == RopeScaling.linear(self.factor, self.original_max_context)

    @property
    def attention_factor(self) -> float:
        """Cosines and sines stay."""
        return 1.0

    def divisors(self, width: int, theta: float) -> np.ndarray:
        """What each rotary frequency is divided by: [width/2], float64."""
        frequency = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        turns = self.original_max_context * frequency / (2.0 * np.pi)  # over the original context
        s = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return np.asarray(1.0 / ((1.0 - s) / self.factor + s))


@dataclasses.dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): slow features are divided by the factor, fast ones stay, with a ramp in between.

    Attributes:
      factor: context now / context before.
      original_max_context: context before, in tokens.
      attention_factor: for cosines and sines.
      beta_fast: turns over the original context from which on a feature stays.
      beta_slow: turns up to which it is divided in full.
      truncate: whether the ends of the ramp are whole features.
    """

    factor: float
    original_max_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def divisors(self, width: int, theta: float) -> np.ndarray:
        """What each rotary frequency is divided by: [width/2], float64."""

        def feature(turns: float) -> float:
            return width * math.log(self.original_max_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = feature(self.beta_fast), feature(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / (high - low if high != low else 0.001), 0.0, 1.0)
        return np.asarray(1.0 / (ramp / self.factor + (1.0 - ramp)))


@dataclasses.dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): divisors that were searched, one set for short contexts and one for long ones.

    A key in the cache cannot change its divisors when the sequence grows.  So one set serves all sequences: the long
    one where any may become longer than the original context.

    Attributes:
      short: divisors for sequences within the original context, one per frequency.
      long: those for longer ones.
      original_max_context: in tokens.
      attention_factor: for cosines and sines.
      longest: tokens of the longest sequence that is served.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_context: int
    attention_factor: float
    longest: int

    def divisors(self, width: int, theta: float) -> np.ndarray:
        """What each rotary frequency is divided by: [width/2], float64."""
        del width, theta  # they are in the numbers
        return np.asarray(self.long if self.longest > self.original_max_context else self.short, np.float64)


AnyScaling = RopeScaling | YarnScaling | LongRopeScaling
