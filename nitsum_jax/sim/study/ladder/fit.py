"""A capacity from attainments at a few rates."""

from collections.abc import Sequence

from scipy.optimize import isotonic_regression

from nitsum_jax.sim.policies.search import TARGET


def falling(values: Sequence[float]) -> list[float]:
    """The values nearest to these (least squares) that never rise: attainment falls with the rate but for noise."""
    return [float(value) for value in isotonic_regression(values, increasing=False).x]


def capacity(rates: Sequence[float], attainments: Sequence[float], target: float = TARGET) -> float | None:
    """The rate at which the fitted curve, straight between rates, crosses the target.

    Args:
      rates: ascending.
      attainments: at these rates.
      target: attainment.

    Returns:
      None if even the lowest rate is not served; the highest rate if all are.
    """
    fitted = falling(attainments)
    if fitted[0] < target:
        return None
    for i in range(1, len(rates)):
        if fitted[i] < target:
            share = (fitted[i - 1] - target) / (fitted[i - 1] - fitted[i])
            return rates[i - 1] + share * (rates[i] - rates[i - 1])
    return rates[-1]
