"""What the traffic is like: arrival rates, burstiness and lengths per tier, quick on changes and slow on noise.

Arrivals are counted in bins of one second.  The rate is the mean over a long window unless the last few seconds
differ from it by more than chance allows, given how bursty the tier is; then the window is cut to those seconds and
grows anew. Lengths are kept as the last few hundred; a change of their mean cuts that memory too.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence

_QUANTILES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class TierLoad:
    """Traffic of one tier.

    Attributes:
      tier: name.
      rate: requests per second.
      dispersion: variance over mean of the arrivals per second, at least 1: 1 is Poisson.
      prompts: lengths at evenly spaced quantiles, ascending, each standing for an equal share of the requests.
      output: mean output, tokens.
    """

    tier: str
    rate: float
    dispersion: float
    prompts: tuple[int, ...]
    output: float


@dataclasses.dataclass(frozen=True, slots=True)
class EstimatorConfig:
    """Windows and thresholds.

    Attributes:
      window_s: over which the rate is averaged.
      recent_s: seconds that are tested for a change, and the last half of them.
      change: how many standard deviations make a change.
      lengths: lengths that are remembered.
      recent_lengths: of these, how many are tested for a change.
    """

    window_s: int = 60
    recent_s: int = 8
    change: float = 3.0
    lengths: int = 256
    recent_lengths: int = 32


class _Lengths:
    def __init__(self, config: EstimatorConfig):
        self._config = config
        self._values: collections.deque[int] = collections.deque(maxlen=config.lengths)
        self.version = 0

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: int) -> None:
        self._values.append(value)
        self.version += 1
        recent = self._config.recent_lengths
        if self.version % recent == 0 and len(self._values) >= 3 * recent and self._changed(recent):
            self._values = collections.deque(list(self._values)[-recent:], maxlen=self._config.lengths)

    def _changed(self, recent: int) -> bool:
        values = list(self._values)
        old, new = values[:-recent], values[-recent:]
        mean = sum(old) / len(old)
        variance = sum((value - mean) ** 2 for value in old) / len(old)
        gap = abs(sum(new) / recent - mean)
        return gap > (self._config.change + 1) * math.sqrt(variance * (1 / recent + 1 / len(old))) + 0.05 * mean

    def mean(self) -> float:
        return sum(self._values) / len(self._values)

    def quantiles(self) -> tuple[int, ...]:
        ordered = sorted(self._values)
        count = len(ordered)
        return tuple(ordered[min(count - 1, int((i + 0.5) * count / _QUANTILES))] for i in range(_QUANTILES))


class OutputLengths:
    """Expected output lengths by tier, from those of requests that have ended."""

    def __init__(self, tiers: Iterable[str], config: EstimatorConfig = EstimatorConfig(), first: float = 128.0):
        """Knows nothing yet; `first` stands for output lengths until the first request of a tier has ended."""
        self._lengths = {tier: _Lengths(config) for tier in tiers}
        self._first = first

    def ended(self, tier: str, tokens: int) -> None:
        """A request ended by itself."""
        self._lengths[tier].add(tokens)

    def expected(self, tier: str) -> float:
        """Expected output length, tokens."""
        lengths = self._lengths[tier]
        if not len(lengths):
            return self._first
        # Few observations are short ones: long outputs end last.
        weight = min(1.0, len(lengths) / 32)
        return weight * lengths.mean() + (1 - weight) * max(self._first, lengths.mean())


class _Arrivals:
    def __init__(self, config: EstimatorConfig, now_s: float):
        self._config = config
        self._bins: collections.deque[int] = collections.deque(maxlen=config.window_s)  # whole seconds, newest last
        self._second = math.floor(now_s)
        self._count = 0
        self._calm = 1.0  # dispersion over a longer time
        self.changes = 0

    @property
    def seconds(self) -> int:
        return len(self._bins)

    def add(self, now_s: float) -> None:
        self.advance(now_s)
        self._count += 1

    def advance(self, now_s: float) -> None:
        second = math.floor(now_s)
        if second - self._second > self._config.window_s:
            self._bins.clear()
            self._bins.extend([0] * self._config.window_s)
            self._count = 0
            self._second = second
        while self._second < second:
            self._bins.append(self._count)
            self._count = 0
            self._second += 1
            self._test()

    def _test(self) -> None:
        for recent in (self._config.recent_s // 2, self._config.recent_s):
            if len(self._bins) < 2 * recent:
                return
            bins = list(self._bins)
            old, new = bins[:-recent], bins[-recent:]
            mean = sum(old) / len(old)
            deviation = math.sqrt(max(mean, 0.05) * self.dispersion(old) * (1 / recent + 1 / len(old)))
            if abs(sum(new) / recent - mean) > self._config.change * deviation:
                self._bins = collections.deque(new, maxlen=self._config.window_s)
                self.changes += 1
                return

    def rate(self) -> float:
        if not self._bins:
            return float(self._count)
        return sum(self._bins) / len(self._bins)

    def dispersion(self, bins: Sequence[int] | None = None) -> float:
        bins = list(self._bins) if bins is None else bins
        if len(bins) < 4:
            return max(1.0, self._calm)
        mean = sum(bins) / len(bins)
        if mean <= 0:
            return 1.0
        value = max(1.0, sum((count - mean) ** 2 for count in bins) / (len(bins) - 1) / mean)
        self._calm += 0.05 * (value - self._calm)
        return value


class WorkloadEstimator:
    """Watches requests come and end; estimates the load of each tier.

    Pure: the clock is what callers pass, and must not run backwards.
    """

    def __init__(
        self,
        tiers: Iterable[str],
        config: EstimatorConfig = EstimatorConfig(),
        now_s: float = 0.0,
        output: float = 128.0,
    ):
        """Knows nothing yet; `output` stands for output lengths until the first request of a tier has ended."""
        self._arrivals = {tier: _Arrivals(config, now_s) for tier in tiers}
        self._prompts = {tier: _Lengths(config) for tier in self._arrivals}
        self._outputs = OutputLengths(self._arrivals, config, output)

    @property
    def settled_s(self) -> int:
        """Seconds for which no tier's rate has changed by more than chance; rates are averaged over these or more."""
        seen = (arrivals for tier, arrivals in self._arrivals.items() if len(self._prompts[tier]))
        return min((arrivals.seconds for arrivals in seen), default=0)

    @property
    def changes(self) -> int:
        """How often the rate of a tier has changed by more than chance."""
        return sum(arrivals.changes for arrivals in self._arrivals.values())

    def arrived(self, now_s: float, tier: str, prompt_tokens: int) -> None:
        """A request came."""
        self._arrivals[tier].add(now_s)
        self._prompts[tier].add(prompt_tokens)

    def finished(self, now_s: float, tier: str, output_tokens: int) -> None:
        """A request ended by itself."""
        self._outputs.ended(tier, output_tokens)

    def output(self, tier: str) -> float:
        """Expected output length, tokens."""
        return self._outputs.expected(tier)

    def loads(self, now_s: float) -> tuple[TierLoad, ...]:
        """The load of every tier that has been seen."""
        loads = []
        for tier, arrivals in self._arrivals.items():
            if not len(self._prompts[tier]):
                continue
            arrivals.advance(now_s)
            loads.append(
                TierLoad(
                    tier, arrivals.rate(), arrivals.dispersion(), self._prompts[tier].quantiles(), self.output(tier)
                )
            )
        return tuple(loads)
