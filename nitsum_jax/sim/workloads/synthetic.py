"""Seeded synthetic workloads: arrivals, lengths and tier mixes that follow schedules.

A workload is made of streams.  Each has random numbers of its own, from the seed and its place in the list, so adding a
stream at the end leaves the others as they are.  The same seed gives the same workload, bit for bit.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads.schedules import Schedule, constant
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload, mix

_Floats = npt.NDArray[np.float64]


class Lengths(Protocol):
    """A distribution of token counts."""

    def sample(self, random: np.random.Generator, count: int) -> _Floats:
        """`[count]` lengths, not yet rounded, above 0."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Lengths whose logarithm is normal.

    Attributes:
      mean: of the lengths (not of the logarithm), tokens.
      sigma: standard deviation of the natural logarithm, 0 for a fixed length.
      longest: longer ones are cut to this.

    Raises:
      InvalidInputError: a number is out of its range.
    """

    mean: float
    sigma: float
    longest: int = 131_072

    def __post_init__(self) -> None:
        if not 1 <= self.mean <= self.longest or not 0 <= self.sigma < 10:
            raise InvalidInputError(f"{self}: mean must lie in 1 to longest, sigma in 0 to 10")

    def sample(self, random: np.random.Generator, count: int) -> _Floats:
        """See Lengths."""
        drawn = random.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.minimum(drawn, self.longest)


@dataclasses.dataclass(frozen=True, slots=True)
class EmpiricalLengths:
    """Lengths by a table of quantiles, straight lines between them.

    Attributes:
      probabilities: ascending, from 0 to 1.
      quantiles: the length at each, not descending, at least 1.

    Raises:
      InvalidInputError: the table is not such a one.
    """

    probabilities: tuple[float, ...]
    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        p, q = self.probabilities, self.quantiles
        ascending = len(p) == len(q) >= 2 and all(a < b for a, b in itertools.pairwise(p))
        if not ascending or (p[0], p[-1]) != (0, 1) or q[0] < 1 or any(b < a for a, b in itertools.pairwise(q)):
            raise InvalidInputError(
                "a table of quantiles needs probabilities that rise from 0 to 1 and as many lengths, from 1 up, that"
                " do not fall"
            )

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "EmpiricalLengths":
        """The distribution of these lengths, as of a trace.

        Raises:
          InvalidInputError: there are none.
        """
        if not len(lengths):
            raise InvalidInputError("empirical lengths: the trace has no requests")
        # Each length is a step of the same width; both ends of a step, so that one length is drawn as it stands.
        values, counts = np.unique(np.asarray(lengths, np.float64), return_counts=True)
        edges = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
        edges[-1] = 1.0
        tiny = 1e-9
        p = np.stack([edges[:-1] + tiny, edges[1:] - tiny], 1).ravel()
        p[0], p[-1] = 0.0, 1.0
        return cls(tuple(p.tolist()), tuple(np.repeat(values, 2).tolist()))

    def sample(self, random: np.random.Generator, count: int) -> _Floats:
        """See Lengths."""
        return np.interp(random.random(count), self.probabilities, self.quantiles)


class Arrivals(Protocol):
    """A point process that follows a rate."""

    def times(self, random: np.random.Generator, rate: Schedule, seconds: float) -> _Floats:
        """Sorted arrival times in [0, seconds], `[requests]`."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class PoissonArrivals:
    """Arrivals that know nothing of each other."""

    def times(self, random: np.random.Generator, rate: Schedule, seconds: float) -> _Floats:
        """See Arrivals."""
        course = _Course.of(rate, seconds)
        return course.inverse(np.sort(random.uniform(0, course.total, random.poisson(course.total))))


@dataclasses.dataclass(frozen=True, slots=True)
class GammaArrivals:
    """Gaps drawn from a gamma distribution; the schedule stretches and squeezes them.

    Attributes:
      cv: coefficient of variation of the gaps: 1 is a Poisson process, above 1 is bursty, below 1 is regular.  The
        index of dispersion over long windows is its square.

    Raises:
      InvalidInputError: cv is not above 0.
    """

    cv: float

    def __post_init__(self) -> None:
        if not (self.cv > 0 and math.isfinite(self.cv)):
            raise InvalidInputError(f"gamma arrivals: cv={self.cv} must be a number above 0")

    def times(self, random: np.random.Generator, rate: Schedule, seconds: float) -> _Floats:
        """See Arrivals."""
        course = _Course.of(rate, seconds)
        shape = self.cv**-2
        # Begun well before 0, so that 0 is a moment like any other and not an arrival.
        at = -20 * (1 + self.cv**2)
        found = []
        while at < course.total:
            gaps = random.gamma(shape, 1 / shape, max(64, int((course.total - at) * 1.1)))
            points = at + np.cumsum(gaps)
            at = float(points[-1])
            found.append(points)
        points = np.concatenate([np.zeros(0), *found])
        return course.inverse(points[(points >= 0) & (points < course.total)])


@dataclasses.dataclass(frozen=True, slots=True)
class ModulatedArrivals:
    """A Poisson process whose rate is itself random: bursts on several time scales.

    The scheduled rate is multiplied by one factor per time scale.  Each factor is drawn from a gamma distribution of
    mean 1, held for an exponential time, and drawn anew.  A factor of variance v held for tau seconds on average is
    correlated as v exp(-t / tau), so the index of dispersion can be matched at several windows (`expected_dispersion`).

    Attributes:
      scales: pairs (tau in seconds, variance).
      exact: the number of requests is the scheduled one, only their places are random; False: the number is random too.

    Raises:
      InvalidInputError: a number is out of its range.
    """

    scales: tuple[tuple[float, float], ...]
    exact: bool = True

    def __post_init__(self) -> None:
        if not self.scales or not all(tau > 0 and v >= 0 and math.isfinite(tau + v) for tau, v in self.scales):
            raise InvalidInputError(f"modulated arrivals: scales={self.scales}: give (seconds above 0, variance) pairs")

    def times(self, random: np.random.Generator, rate: Schedule, seconds: float) -> _Floats:
        """See Arrivals."""
        cuts = rate.cuts(seconds)
        factors = []
        for tau, variance in self.scales:
            changes = np.sort(random.uniform(0, seconds, random.poisson(seconds / tau)))
            levels = _mean_one_gamma(random, variance, len(changes) + 1)
            factors.append((changes, levels))
            cuts = np.union1d(cuts, changes)
        factor = np.ones(len(cuts) - 1)
        for changes, levels in factors:
            factor *= levels[np.searchsorted(changes, cuts[:-1], side="right")]
        course = _Course.of(rate, seconds, cuts, factor)
        expected = rate.mean(seconds) * seconds
        count = round(expected) if self.exact else random.poisson(course.total)
        if course.total == 0:
            return np.zeros(0)
        return course.inverse(np.sort(random.uniform(0, course.total, count)))

    def expected_dispersion(self, rate: float, window_s: float) -> float:
        """Index of dispersion in windows of window_s at a steady rate, for a random count (exact=False)."""
        x = np.linspace(0, 1, 4001)
        covariance = np.prod([1 + v * np.exp(-x * window_s / tau) for tau, v in self.scales], axis=0) - 1
        return float(1 + rate * window_s * 2 * np.trapezoid((1 - x) * covariance, x))


@dataclasses.dataclass(frozen=True, slots=True)
class Stream:
    """Requests of one tier.

    Attributes:
      tier: their tier.
      rate: requests per second over time.
      arrivals: how they are spread about the rate.
      prompt, output: their lengths.
      prompt_scale, output_scale: what the lengths are multiplied with over time, by the request's arrival.
    """

    tier: str
    rate: Schedule
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = PoissonArrivals()
    prompt_scale: Schedule = constant(1.0)
    output_scale: Schedule = constant(1.0)


def generate(streams: Sequence[Stream], seconds: float, seed: int, name: str = "synthetic") -> Workload:
    """A workload of these streams.

    Args:
      streams: at least one.
      seconds: its length, above 0.
      seed: at least 0.
      name: of the workload.

    Raises:
      InvalidInputError: there are no streams, or seconds or seed is out of its range.
    """
    if not streams or not (seconds > 0 and math.isfinite(seconds)) or seed < 0:
        raise InvalidInputError(
            f"synthetic workload: {len(streams)} streams, {seconds} s, seed {seed}: give a stream, seconds above 0 and"
            " a seed of 0 or more"
        )
    parts = []
    for i, stream in enumerate(streams):
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(i,))))
        at = stream.arrivals.times(random, stream.rate, seconds)
        prompt = _tokens(stream.prompt.sample(random, len(at)) * stream.prompt_scale.at(at))
        output = _tokens(stream.output.sample(random, len(at)) * stream.output_scale.at(at))
        rows = zip(at.tolist(), prompt, output, strict=True)
        parts.append(Workload(tuple(TraceRequest(t, p, o, stream.tier) for t, p, o in rows), name, seconds))
    return mix(parts, name)


@dataclasses.dataclass(frozen=True, slots=True)
class _Course:
    """An intensity in linear pieces, and its integral.

    Attributes:
      cuts: `[pieces + 1]`, seconds.
      left, right: `[pieces]`, the intensity at both ends of each piece.
      area: `[pieces + 1]`, the integral up to each cut.
    """

    cuts: _Floats
    left: _Floats
    right: _Floats
    area: _Floats

    @classmethod
    def of(
        cls, rate: Schedule, seconds: float, cuts: _Floats | None = None, factor: float | _Floats = 1.0
    ) -> "_Course":
        cuts = rate.cuts(seconds) if cuts is None else cuts
        left, right = rate.at(cuts[:-1]) * factor, rate.before(cuts[1:]) * factor
        area = np.concatenate([[0.0], np.cumsum(np.diff(cuts) * (left + right) / 2)])
        return cls(cuts, left, right, area)

    @property
    def total(self) -> float:
        return float(self.area[-1])

    def inverse(self, points: _Floats) -> _Floats:
        """Times at which the integral reaches these values, `[points]`, for sorted points in [0, total]."""
        # Points lie in pieces of some area: side="right" passes over pieces without any.
        piece = np.clip(np.searchsorted(self.area, points, side="right") - 1, 0, len(self.left) - 1)
        rest = points - self.area[piece]
        a, b, width = self.left[piece], self.right[piece], np.diff(self.cuts)[piece]
        # rest = a x + (b - a) / (2 width) x^2, solved in the form that needs no division by b - a.
        root = np.sqrt(np.maximum(a * a + 2 * (b - a) / width * rest, 0.0))
        denominator = a + root
        x = np.where(denominator > 0, 2 * rest / np.where(denominator > 0, denominator, 1.0), 0.0)
        times = np.clip(self.cuts[piece] + np.clip(x, 0.0, width), 0.0, self.cuts[-1])
        return np.maximum.accumulate(times) if len(times) else times


def _mean_one_gamma(random: np.random.Generator, variance: float, count: int) -> _Floats:
    if variance == 0:
        return np.ones(count)
    return random.gamma(1 / variance, variance, count)


def _tokens(lengths: _Floats) -> list[int]:
    """Whole tokens, at least 1."""
    return np.maximum(np.rint(lengths), 1).astype(np.int64).tolist()
