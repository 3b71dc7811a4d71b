"""Decisions of a planner for a cell of several nodes, whose candidates cannot be listed."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import Shape, place
from nitsum_jax.control.planning.decision import Candidate, Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.fleet.program import Scenario
from nitsum_jax.control.planning.fleet.search import FleetCell, search
from nitsum_jax.control.planning.queueing import Prediction, QueueingModel
from nitsum_jax.control.planning.rollout import Arrival, rollout
from nitsum_jax.control.tiers import Tier


class FleetPlanner(Protocol):
    """What is needed of a planner; `planner.Planner` is one."""

    # ruff: noqa: D102
    @property
    def config(self) -> PlannerConfig: ...
    @property
    def cost(self) -> CostModel: ...
    @property
    def tiers(self) -> Mapping[str, Tier]: ...
    @property
    def tps(self) -> Sequence[int]: ...
    @property
    def resident_tp(self) -> int: ...


def decide(planner: FleetPlanner, inputs: PlanInputs, node: int | None = None) -> Decision:
    """The plan for these inputs; see `search`.

    Args:
      planner: its cost model, tiers, TPs and settings.
      inputs: what it is asked.
      node: devices of a node, which no instance spans; those that the profile speaks of if not given.
    """
    config = planner.config
    model = QueueingModel(planner.cost, planner.tiers, inputs.loads, resident_tp=planner.resident_tp)
    if not model.tiers:
        return Decision(inputs.time_s, inputs, (), inputs.plan, False, "no request has come yet")
    scenarios = (Scenario(1.0, 1 - config.headroom_weight), Scenario(config.headroom, config.headroom_weight))

    def score(shapes: Sequence[Shape]) -> tuple[float, Prediction]:
        predictions = [model.predict(shapes, scenario.scale) for scenario in scenarios]
        parts = (s.weight * p.goodput / s.scale for s, p in zip(scenarios, predictions, strict=True))
        return sum(parts) / model.offered, predictions[0]

    def replay(shapes: Sequence[Shape], devices: int) -> float:
        recent = _thinned(inputs.recent, sum(load.rate for load in inputs.loads) * devices / inputs.num_devices)
        plan = place(shapes, devices)
        return rollout(
            planner.cost,
            planner.tiers.values(),
            plan,
            recent,
            inputs.loads,
            planner.resident_tp,
            max_batch=inputs.max_batch,
        ).share

    found = search(
        FleetCell(inputs.plan, inputs.num_devices, node or planner.cost.profile.devices, inputs.lost, inputs.allowed),
        planner.cost,
        planner.tiers,
        inputs.loads,
        model.tiers,
        planner.tps,
        score,
        hysteresis=config.hysteresis,
        scenarios=scenarios,
        splits=config.splits,
        replay=replay if len(inputs.recent) > 2 else None,
    )
    candidates = tuple(
        Candidate(str(o), o.prediction.goodput, o.score, o.prediction.load, o.prediction.attainment, o.replayed)
        for o in found.options
    )
    return Decision(inputs.time_s, inputs, candidates, found.plan, found.plan != inputs.plan, found.reason)


def _thinned(recent: Sequence[Arrival], rate: float) -> Sequence[Arrival]:
    """Every so many of the arrivals, so that they come at about this rate."""
    seconds = recent[-1].time_s - recent[0].time_s
    return recent[:: max(1, round(len(recent) / max(seconds, 1e-3) / max(rate, 1e-9)))]
