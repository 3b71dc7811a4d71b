"""Decisions made again from their log: the same inputs must give the same choices."""

import dataclasses
import pathlib

from nitsum_jax.control.model.corrected_cost import CorrectedCost
from nitsum_jax.control.planning.decision import PlanInputs
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.records import read_decisions


@dataclasses.dataclass(frozen=True, slots=True)
class ReplayedDecisions:
    """What came of it.

    Attributes:
      decisions: made again.
      differences: one line for each that came out otherwise.
    """

    decisions: int
    differences: tuple[str, ...]


def replay(path: str | pathlib.Path, setting: Setting) -> ReplayedDecisions:
    """Makes the decisions of a log again.

    Args:
      path: decisions.jsonl of a run under adaptive control.
      setting: profile and tiers of that run.

    Raises:
      InvalidInputError: the log cannot be read; `path:line: what is wrong`.
    """
    cost = CorrectedCost(setting.cost.profile)  # a running cell corrects its profile, and says with what
    planner = Planner(cost, setting.tiers)
    differences = []
    count = 0
    for line, record in enumerate(read_decisions(path), 1):
        try:
            cost.adopt({int(tp): (pair[0], pair[1]) for tp, pair in record.inputs.get("ratios", {}).items()})
            decision = planner.decide(PlanInputs.from_json(record.inputs))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InvalidInputError(f"{path}:{line}: not the inputs of a decision: {' '.join(repr(e).split())}") from e
        count += 1
        if decision.choice.unplaced != record.choice:
            differences.append(
                f"{path}:{line}: at {record.time_s:.3f} s: {decision.choice.unplaced} instead of {record.choice}"
            )
    return ReplayedDecisions(count, tuple(differences))
