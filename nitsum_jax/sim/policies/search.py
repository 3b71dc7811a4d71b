"""Searches: the best of a family of policies for a load, and the highest rate that a policy serves.

A load is a workload at every rate.  Rates lie on a grid (`RateGrid`), so that all policies are measured at the same
ones and runs can be kept.  Searches see the whole workload, as a choice in hindsight may.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.runs.summary import Figures, figures_of
from nitsum_jax.sim.workloads.workload import Workload, concatenate, window

TARGET = 0.9
"""Attainment that defines a capacity."""

_MOST_ROUNDS = 12

Evaluate = Callable[[RunPolicy, int], Figures]
"""The figures of a policy at a level of the grid."""


@dataclasses.dataclass(frozen=True, slots=True)
class RateGrid:
    """Rate factors in a geometric row: level i is `ratio ** i`."""

    ratio: float = 1.1

    def factor(self, level: float) -> float:
        """Rate factor of a level."""
        return self.ratio**level

    def level(self, factor: float) -> int:
        """The level next to a factor."""
        return round(math.log(factor, self.ratio))


def run(
    setting: Setting, workload: Workload, policy: RunPolicy, *, give_up: float | None = None, compile_s: float = 0.0
) -> Figures:
    """Simulates and sums up; `give_up` ends the run once more than this share is certain to miss."""
    most = None if give_up is None else math.ceil(give_up * len(workload.requests))
    outcome = simulate(
        workload,
        setting.tiers,
        setting.cost,
        policy,
        num_devices=setting.num_devices,
        most_missed=most,
        compile_s=compile_s,
    )
    return figures_of(outcome, setting.num_devices)


def sample(workload: Workload, seconds: float, parts: int = 4) -> Workload:
    """Evenly spaced windows of a workload, one after the other, for a first look.

    Args:
      workload: what they are taken of; returned as it is if it is no longer.
      seconds: how long they are together.  Windows must be several times as long as requests take, or layouts that
        cannot hold the rate look as if they could.
      parts: windows, each of the same length.
    """
    share = seconds / workload.seconds
    if share >= 1:
        return workload
    piece = workload.seconds / parts
    # From the middle of each piece: what comes before a change of load is not what comes after it.
    windows = [window(workload, i * piece + (1 - share) / 2 * piece, share * piece) for i in range(parts)]
    return concatenate(windows, workload.name)


def tournament(
    policies: Sequence[RunPolicy], level: int, evaluate: Evaluate, keep: int, step: int = 2
) -> list[RunPolicy]:
    """The most promising policies, best first.

    All run at one level; as long as many reach the target, the rest is dropped and the level rises; if none comes
    near it falls.

    Args:
      policies: to compare, at least one.
      level: to begin at.
      evaluate: figures at a level; a run may be given up when it is far from the target.
      keep: how many are wanted at the most.
      step: levels to go up or down at a time.
    """
    field = list(policies)
    seen: set[int] = set()
    ranked = field
    while len(field) > keep and level not in seen and len(seen) < _MOST_ROUNDS:
        seen.add(level)
        reached = {id(policy): evaluate(policy, level).attainment for policy in field}
        ranked = sorted(field, key=lambda policy: -reached[id(policy)])
        best = reached[id(ranked[0])]
        passed = [policy for policy in ranked if reached[id(policy)] >= TARGET]
        if len(passed) > keep:
            field = passed
            level += step
        elif best < 0.7:
            level -= step
        else:
            break
    return ranked[:keep]


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """The highest rate at which a policy reaches the target.

    Attributes:
      factor: of the load's rate, interpolated between the levels on both sides; 0 if it is out of reach.
      below: the highest level that was found to reach the target.
    """

    factor: float
    below: int


def crossing(reached: Callable[[int], float], guess: int, grid: RateGrid, lowest: int) -> Capacity:
    """Bisection over levels, from a guess outward.

    Attainment falls with the rate but for noise; the level returned passed, and the next one did not.

    Args:
      reached: attainment at a level.
      guess: level to begin at.
      grid: what levels mean.
      lowest: level below which it is called out of reach.
    """
    step = 1
    if reached(guess) >= TARGET:
        low = guess
        while reached(low + step) >= TARGET:
            low, step = low + step, 2 * step
        high = low + step
    else:
        high = guess
        if guess > lowest and reached(lowest) < TARGET:  # few requests: a cheap way to learn that it is hopeless
            return Capacity(0.0, lowest - 1)
        while True:
            low = max(lowest, high - step)
            if low >= high:
                return Capacity(0.0, lowest - 1)
            if reached(low) >= TARGET:
                break
            high, step = low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reached(middle) >= TARGET else (low, middle)
    upper, lower = reached(low), reached(high)
    share = (upper - TARGET) / (upper - lower) if upper > lower else 0.0
    return Capacity(grid.factor(low + share), low)


def capacity(policy: RunPolicy, guess: int, evaluate: Evaluate, grid: RateGrid, lowest: int) -> Capacity:
    """The highest rate that a policy serves: see `crossing`."""
    return crossing(lambda level: evaluate(policy, level).attainment, guess, grid, lowest)


def best_by_capacity(
    policies: Sequence[RunPolicy], guess: int, evaluate: Evaluate, grid: RateGrid, lowest: int
) -> tuple[RunPolicy, Capacity]:
    """The policy of the highest capacity; those that do not pass the best level so far are not bisected."""
    best, found = policies[0], capacity(policies[0], guess, evaluate, grid, lowest)
    for policy in policies[1:]:
        level = max(found.below, lowest)
        if evaluate(policy, level).attainment < TARGET and found.factor > 0:
            continue
        other = capacity(policy, level, evaluate, grid, lowest)
        if other.factor > found.factor:
            best, found = policy, other
    return best, found
