"""How many cells there should be: by attainment and predicted slack, not by the length of queues.

A cell's *pressure* is the largest share of a target that a usual request of some tier is predicted to take there. Cells
are added when requests miss their targets or pressure comes near to 1, and taken away when the others would still have
slack with what it does.  Pure.
"""

import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import TierSet


@dataclasses.dataclass(frozen=True, slots=True)
class CellPressure:
    """A cell's need.

    Attributes:
      pressure: largest predicted share of a target; above 1 it is missed.
      attainment: share of its latest requests that met both targets; 1 without any.
    """

    pressure: float
    attainment: float


@dataclasses.dataclass(frozen=True, slots=True)
class ScalingConfig:
    """When to add and to take away.

    Attributes:
      high: mean pressure at which a cell is added.
      low: mean pressure that the others may have when one is taken away.
      attainment: share of the requests that must meet their targets.
    """

    high: float = 0.8
    low: float = 0.5
    attainment: float = 0.95


def pressure_of(
    tiers: TierSet, forecasts: Sequence[TierForecast], met: Sequence[bool], time_scale: float = 1.0
) -> CellPressure:
    """The pressure of a cell.

    Args:
      tiers: of the cell.
      forecasts: of its tiers; one that no cell of this kind could serve even when idle says nothing of its load.
      met: whether its latest requests met their targets.
      time_scale: seconds of the forecasts for one of the targets; not 1 in a paced cell in slow motion.
    """
    found = (one for one in forecasts if one.tier in tiers and math.isfinite(one.ttft_s) and one.wait_s > 0)
    targets = ((one, tiers.get(one.tier).scaled(time_scale)) for one in found)
    shares = [max(one.ttft_s * 1000 / tier.ttft_ms, one.tpot_s * 1000 / tier.tpot_ms) for one, tier in targets]
    return CellPressure(min(max(shares, default=0.0), 10.0), sum(met) / len(met) if met else 1.0)


def cells_wanted(
    now: int, pressures: Sequence[CellPressure], least: int, most: int, config: ScalingConfig = ScalingConfig()
) -> int:
    """How many cells there should be.

    Args:
      now: how many there are.
      pressures: of those that have said something.
      least: never fewer.
      most: never more.
      config: when to change.
    """
    wanted = now
    if pressures:
        mean = sum(one.pressure for one in pressures) / len(pressures)
        attained = sum(one.attainment for one in pressures) / len(pressures)
        if mean > config.high or (attained < config.attainment and mean > config.low):
            wanted = now + max(1, math.ceil(now * (min(mean, 2.0) - 1)))
        elif now > 1 and attained >= config.attainment and mean * now / (now - 1) < config.low:
            wanted = now - 1
    return max(least, min(most, wanted))
