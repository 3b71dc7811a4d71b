"""Numbers that change over time by plan: rates, shares of tiers, scales of lengths."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nitsum_jax.errors import InvalidInputError


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    """A value over time: straight lines between points, constant before the first and after the last.

    Attributes:
      points: pairs (time in seconds, value), times in order, values at least 0.  Two points of one time are a jump; at
        that time the later one holds.

    Raises:
      InvalidInputError: no points, times out of order, or a number that is not finite or below 0.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        numbers = [x for point in self.points for x in point]
        if not self.points or not all(math.isfinite(x) for x in numbers) or any(v < 0 for _, v in self.points):
            raise InvalidInputError(f"schedule {self.points}: give (seconds, value) pairs, values 0 or more")
        if any(b < a for (a, _), (b, _) in itertools.pairwise(self.points)):
            raise InvalidInputError(f"schedule {self.points}: the times must be in order")

    def at(self, time_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Values at these times, same shape; at a jump the value after it."""
        return self._values(np.asarray(time_s, np.float64), "right")

    def before(self, time_s: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Values just before these times, same shape; differs from `at` in jumps only."""
        return self._values(np.asarray(time_s, np.float64), "left")

    def scaled(self, factor: float) -> "Schedule":
        """The same course with all values multiplied."""
        return Schedule(tuple((t, v * factor) for t, v in self.points))

    def mean(self, seconds: float) -> float:
        """Mean value over [0, seconds]."""
        cuts = self.cuts(seconds)
        areas = np.diff(cuts) * (self.at(cuts[:-1]) + self.before(cuts[1:])) / 2
        return float(areas.sum()) / seconds

    def cuts(self, seconds: float) -> npt.NDArray[np.float64]:
        """0, the times of the points inside, and seconds: between neighbours the course is a straight line."""
        inside = [t for t, _ in self.points if 0 < t < seconds]
        return np.unique(np.array([0.0, *inside, seconds]))

    def _values(self, time_s: npt.NDArray[np.float64], side: str) -> npt.NDArray[np.float64]:
        times, values = (np.array(column, np.float64) for column in zip(*self.points, strict=True))
        right = np.searchsorted(times, time_s, side="right" if side == "right" else "left")
        left = np.clip(right - 1, 0, len(times) - 1)
        right = np.clip(right, 0, len(times) - 1)
        width = times[right] - times[left]
        part = np.where(width > 0, (time_s - times[left]) / np.where(width > 0, width, 1.0), 0.0)
        # Before the first point both ends are the first point, after the last the last.
        return values[left] + np.clip(part, 0.0, 1.0) * (values[right] - values[left])


def constant(value: float) -> Schedule:
    """The same value always."""
    return Schedule(((0.0, value),))


def steps(values: Sequence[tuple[float, float]]) -> Schedule:
    """Jumps: (from time, value) pairs, each value held until the next one's time.

    Raises:
      InvalidInputError: as Schedule.
    """
    points: list[tuple[float, float]] = []
    for time, value in values:
        if points:
            points.append((time, points[-1][1]))
        points.append((time, value))
    return Schedule(tuple(points))


def ramps(points: Sequence[tuple[float, float]]) -> Schedule:
    """Straight lines from each (time, value) point to the next.

    Raises:
      InvalidInputError: as Schedule.
    """
    return Schedule(tuple(points))


def day_curve(
    low: float, high: float, *, period_s: float = 86_400.0, peak_at_s: float = 43_200.0, seconds: float = 86_400.0
) -> Schedule:
    """A cosine between low and high that peaks at peak_at_s, as 96 straight pieces a period, over [0, seconds].

    Raises:
      InvalidInputError: low is above high or below 0, or a time is not above 0.
    """
    if not 0 <= low <= high or not period_s > 0 or not seconds > 0:
        raise InvalidInputError(
            f"day curve from {low} to {high} every {period_s} s: give 0 <= low <= high, times above 0"
        )
    times = np.linspace(0, seconds, max(2, math.ceil(96 * seconds / period_s) + 1))
    values = (low + high) / 2 + (high - low) / 2 * np.cos(2 * np.pi * (times - peak_at_s) / period_s)
    return Schedule(tuple(zip(times.tolist(), np.maximum(values, 0.0).tolist(), strict=True)))


def bursts(
    base: float, peak: float, *, every_s: float, lasting_s: float, seconds: float, seed: int | None = 0
) -> Schedule:
    """A base value with rectangular bursts, one in each period of every_s.

    Args:
      base: between bursts.
      peak: in a burst.
      every_s: length of a period.
      lasting_s: length of a burst, below every_s.
      seconds: bursts begin before this time.
      seed: draws where in its period each burst begins; None: at the start of each.

    Raises:
      InvalidInputError: a value or time is out of its range.
    """
    if not 0 < lasting_s < every_s or not seconds > 0:
        raise InvalidInputError(f"bursts of {lasting_s} s every {every_s} s: make them shorter than their period")
    random = None if seed is None else np.random.Generator(np.random.PCG64(seed))
    values = [(0.0, base)]
    for period in range(math.ceil(seconds / every_s)):
        slack = 0.0 if random is None else float(random.uniform(0, every_s - lasting_s))
        values += [(period * every_s + slack, peak), (period * every_s + slack + lasting_s, base)]
    return steps(values)
