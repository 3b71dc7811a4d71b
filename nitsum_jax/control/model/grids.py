"""Tables of seconds over one or two counts, read by linear interpolation.

Both kinds rise or stay level along every axis, within the table and beyond its end, where the last two points are drawn
on in a straight line.  So more work never costs less, which the searches that use them rely on.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence

from nitsum_jax.errors import InvalidInputError

_LEVEL = 1e-9
"""Relative rounding that monotony forgives."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Seconds over a count, piecewise linear.

    Attributes:
      points: rising whole numbers, two or more.
      seconds: one for each point, at least 0, never falling.

    Raises:
      InvalidInputError: the lists are not so (on construction).
    """

    points: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_axis(self.points, "points")
        _check_seconds(self.seconds, len(self.points), "seconds")
        for i, (a, b) in enumerate(zip(self.seconds, self.seconds[1:], strict=False), 1):
            if b < a * (1 - _LEVEL):
                raise InvalidInputError(
                    f"seconds[{i}]={b!r} is below the one before, {a!r}: more work cannot take less"
                )

    def at(self, count: float) -> float:
        """Seconds at this count; beyond the ends the nearest two points are drawn on."""
        i = min(max(bisect.bisect_right(self.points, count) - 1, 0), len(self.points) - 2)
        x, y = self.points, self.seconds
        return y[i] + (y[i + 1] - y[i]) / (x[i + 1] - x[i]) * (count - x[i])


@dataclasses.dataclass(frozen=True, slots=True)
class Plane:
    """Seconds over two counts, piecewise bilinear.

    Attributes:
      rows: rising whole numbers, two or more.
      columns: likewise.
      seconds: for each row a tuple with one value for each column, at least 0, never falling along either axis, and
        such that they do not fall beyond the last row and column either: the last slopes along one axis never fall
        along the other.

    Raises:
      InvalidInputError: the lists are not so (on construction).
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _check_axis(self.rows, "rows")
        _check_axis(self.columns, "columns")
        if len(self.seconds) != len(self.rows):
            raise InvalidInputError(
                f"seconds has {len(self.seconds)} lists: give one for each of {len(self.rows)} rows"
            )
        for i, row in enumerate(self.seconds):
            _check_seconds(row, len(self.columns), f"seconds[{i}]")
        for place, low, high in self._steps():
            if high < low * (1 - _LEVEL):
                raise InvalidInputError(f"{place}={high!r} is below its neighbour {low!r}: more work cannot take less")
        last = [row[-1] - row[-2] for row in self.seconds]
        self._check_slopes(last, "columns")
        self._check_slopes([b - a for a, b in zip(self.seconds[-2], self.seconds[-1], strict=True)], "rows")

    def _steps(self) -> list[tuple[str, float, float]]:
        s = self.seconds
        along = [(f"seconds[{i}][{j}]", s[i][j - 1], s[i][j]) for i in range(len(s)) for j in range(1, len(s[0]))]
        return along + [
            (f"seconds[{i}][{j}]", s[i - 1][j], s[i][j]) for i in range(1, len(s)) for j in range(len(s[0]))
        ]

    def _check_slopes(self, slopes: Sequence[float], axis: str) -> None:
        largest = max(row[-1] for row in self.seconds)
        for i, (a, b) in enumerate(itertools.pairwise(slopes), 1):
            if b < a - _LEVEL * largest:
                raise InvalidInputError(
                    f"the last step along {axis} falls from {a!r} to {b!r} at place {i} of the other axis: beyond the"
                    " table more work would take less"
                )

    def at(self, row: float, column: float) -> float:
        """Seconds at these counts; beyond the ends the nearest two rows or columns are drawn on."""
        i = min(max(bisect.bisect_right(self.rows, row) - 1, 0), len(self.rows) - 2)
        low = Line.at(_line(self.columns, self.seconds[i]), column)
        high = Line.at(_line(self.columns, self.seconds[i + 1]), column)
        return low + (high - low) / (self.rows[i + 1] - self.rows[i]) * (row - self.rows[i])


def _line(points: tuple[int, ...], seconds: tuple[float, ...]) -> Line:
    """A line whose parts were checked already."""
    line = object.__new__(Line)
    object.__setattr__(line, "points", points)
    object.__setattr__(line, "seconds", seconds)
    return line


def _check_axis(values: Sequence[object], name: str) -> None:
    if len(values) < 2:
        raise InvalidInputError(f"{name} has {len(values)} entries: give at least two")
    for i, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InvalidInputError(f"{name}[{i}]={value!r} must be a whole number, at least 0")
        if i and value <= values[i - 1]:  # type: ignore[operator]
            raise InvalidInputError(f"{name}[{i}]={value!r} must be above {name}[{i - 1}]={values[i - 1]!r}")


def _check_seconds(values: Sequence[object], count: int, name: str) -> None:
    if len(values) != count:
        raise InvalidInputError(f"{name} has {len(values)} entries: give {count}, one for each point")
    for i, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise InvalidInputError(f"{name}[{i}]={value!r} must be a number of seconds, at least 0")
