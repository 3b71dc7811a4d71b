"""A capacity from attainments at a few rates."""

from collections.abc import Sequence

TARGET = 0.9


def falling(values: Sequence[float]) -> list[float]:
    """The values nearest to these (least squares) that never rise: attainment falls with the rate but for noise."""
    blocks: list[list[float]] = []  # sum, count
    for value in values:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] < blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    return [total / count for total, count in blocks for _ in range(int(count))]


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
