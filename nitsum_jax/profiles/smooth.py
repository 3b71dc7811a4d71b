"""Times that were measured or put together, as tables that never fall: what profiles want."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import isotonic_regression

from nitsum_jax.control.model.grids import Line, Plane

_ROUNDS = 50
_DIGITS = 4


def line(points: Sequence[int], seconds: Sequence[float] | np.ndarray) -> Line:
    """The closest line that never falls: least squares in the logarithms, values above 0."""
    logs = isotonic_regression(np.log(np.asarray(seconds, float))).x
    return Line(tuple(int(p) for p in points), _rounded(np.exp(logs)))


def plane(rows: Sequence[int], columns: Sequence[int], seconds: np.ndarray) -> Plane:
    """A plane near these values, above 0, that falls nowhere, nor beyond its end.

    Least squares in the logarithms along rows and columns in turns, until both agree; what is left is taken up by
    running maxima.
    """
    logs = np.log(np.asarray(seconds, float))
    for _ in range(_ROUNDS):
        before = logs
        logs = np.apply_along_axis(lambda y: isotonic_regression(y).x, 1, logs)
        logs = np.apply_along_axis(lambda y: isotonic_regression(y).x, 0, logs)
        if np.array_equal(before, logs):
            break
    values = np.maximum.accumulate(np.maximum.accumulate(np.exp(logs), axis=0), axis=1)
    values = np.array([_rounded(row) for row in values])
    # The last slopes must not fall along the other axis: raise the last column, then the last row.
    values[:, -1] = values[:, -2] + np.maximum.accumulate(values[:, -1] - values[:, -2])
    values[-1] = values[-2] + np.maximum.accumulate(values[-1] - values[-2])
    return Plane(
        tuple(int(r) for r in rows), tuple(int(c) for c in columns), tuple(tuple(row) for row in values.tolist())
    )


def linear(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Linear interpolation; level before the first point, drawn on after the last."""
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.interp(at, x, y) + np.maximum(at - x[-1], 0) * slope


def drawn_on(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """y with its missing values (nan) at the end drawn on from the last two that are there."""
    known = np.isfinite(y)
    return np.where(known, y, linear(x[known], y[known], np.asarray(x, float)))


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    """Four digits are more than was measured; rounding keeps the order."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())
