"""Which plan a cell should have: search over layouts, roles and tier placement.

Every candidate gets a goodput predicted by the queueing estimate at the load as it is and at a larger one, since load
that is only just met leaves no room for the next burst.  The best few are then replayed: the requests of the last
seconds run through the model of the cell under each of them, from the same start, and what the replay says is blended
in.  The present plan is one of them.  Another is chosen only if it is predicted to gain more than the switch costs
and more than noise.  Pure: a `PlanInputs` and the same settings always give the same decision, so one can be replayed
from a log.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nitsum_jax.control.candidates import mixed_plans, split_plans
from nitsum_jax.control.cost_model import CostModel
from nitsum_jax.control.estimate import TierLoad
from nitsum_jax.control.plan import CellPlan, InstancePlan, Shape, fits, place, shapes_text
from nitsum_jax.control.queueing import Prediction, QueueingModel
from nitsum_jax.control.rollout import Arrival, rollout
from nitsum_jax.control.tiers import Tier


@dataclasses.dataclass(frozen=True, slots=True)
class PlannerConfig:
    """How a planner decides.

    Attributes:
      least_kv_share: TPs whose weights would leave less than this share of a device for KV cache are not used (all
        devices keep the weights of the least TP in use, so that switches move none).
      headroom: the larger load is this many times the load.
      headroom_weight: weight of the prediction at the larger load.
      finalists: candidates, besides the present plan, that are replayed.
      replayed: requests that are replayed at the most.
      replay_weight: weight of the replay against the estimate.
      hysteresis: least gain, as a share of the offered goodput, for which a switch is made.
      splits: whether plans with prefill and decode apart are candidates.
      tps: TPs that may be used; empty: all that the profile has and that leave room for KV cache.
    """

    least_kv_share: float = 0.25
    headroom: float = 1.3
    headroom_weight: float = 0.35
    finalists: int = 3
    replayed: int = 96
    replay_weight: float = 0.6
    hysteresis: float = 0.02
    splits: bool = True
    tps: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class PlanInputs:
    """All that a decision depends on, besides the settings.

    Attributes:
      time_s: when.
      plan: in force.
      num_devices: of the cell.
      lost: devices that cannot be used.
      loads: of the tiers.
      recent: the last arrivals, for the replay.
      allowed: layouts (texts without tiers, `shapes_text` of shapes without tiers) that may be used; empty: all.
    """

    time_s: float
    plan: CellPlan
    num_devices: int
    lost: tuple[int, ...]
    loads: tuple[TierLoad, ...]
    recent: tuple[Arrival, ...] = ()
    allowed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "PlanInputs":
        """Reads what `to_json` wrote."""
        loads = tuple(TierLoad(**(load | {"prompts": tuple(load["prompts"])})) for load in values["loads"])
        recent = tuple(Arrival(**arrival) for arrival in values["recent"])
        return PlanInputs(
            values["time_s"],
            _plan_from_json(values["plan"]),
            values["num_devices"],
            tuple(values["lost"]),
            loads,
            recent,
            tuple(values["allowed"]),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered.

    Attributes:
      plan: text.
      goodput: weighted requests per second that would meet both targets, by the estimate.
      score: the estimate with headroom, as a share of the offered goodput.
      load: of its fullest instances.
      attainment: per tier.
      replayed: share of the replayed goodput it met, if it was replayed.
    """

    plan: str
    goodput: float
    score: float
    load: float
    attainment: Mapping[str, float]
    replayed: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What a planner says.

    Attributes:
      time_s: when.
      inputs: what it was decided from.
      candidates: the best few, and the present plan.
      choice: the plan to have.
      switch: whether it differs from the present one.
      reason: one line.
    """

    time_s: float
    inputs: PlanInputs
    candidates: tuple[Candidate, ...]
    choice: CellPlan
    switch: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal object."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Decision":
        """Reads what `to_json` wrote."""
        return Decision(
            values["time_s"],
            PlanInputs.from_json(values["inputs"]),
            tuple(Candidate(**candidate) for candidate in values["candidates"]),
            _plan_from_json(values["choice"]),
            values["switch"],
            values["reason"],
        )


def least_tp(cost: CostModel, config: PlannerConfig) -> int:
    """The least TP that a cell should use: see `PlannerConfig.least_kv_share`."""
    profile = cost.profile
    for tp in cost.tps:
        kv = cost.kv_capacity_tokens(tp) * profile.kv_bytes_per_token / tp  # bytes of a device
        if kv >= config.least_kv_share * (kv + profile.weight_bytes / tp):
            return tp
    return cost.tps[-1]


class Planner:
    """Chooses plans for one cell and one set of tiers."""

    def __init__(self, cost: CostModel, tiers: Iterable[Tier], config: PlannerConfig = PlannerConfig()):
        """Makes a planner; it keeps nothing between decisions but tables that follow from its arguments."""
        self.cost = cost
        self.tiers = {tier.name: tier for tier in tiers}
        self.config = config
        least = min(config.tps) if config.tps else least_tp(cost, config)
        self.tps = tuple(tp for tp in cost.tps if tp >= least and (not config.tps or tp in config.tps))
        self.resident_tp = self.tps[0]
        self._candidates: dict[tuple, tuple[tuple[Shape, ...], ...]] = {}

    def decide(self, inputs: PlanInputs) -> Decision:
        """The plan for these inputs."""
        if inputs.num_devices > self.cost.profile.devices:
            from nitsum_jax.control.fleet_decision import decide  # it needs this module

            return decide(self, inputs)
        config = self.config
        model = QueueingModel(self.cost, self.tiers, inputs.loads, resident_tp=self.resident_tp)
        if not model.tiers:
            return Decision(inputs.time_s, inputs, (), inputs.plan, False, "no request has come yet")
        offered = model.offered
        now = inputs.plan.shapes
        scored = {self._key(now): self._scored(model, now, offered)}
        for shapes in self._plans(inputs.num_devices, inputs.lost, model.tiers, inputs.allowed):
            key = self._key(shapes)
            if key not in scored:
                scored[key] = self._scored(model, shapes, offered)
        present = scored.pop(self._key(now))
        ranked = sorted(scored.values(), key=lambda item: (-item[0], item[1].load, shapes_text(item[2])))
        finalists = [present, *_diverse(ranked, config.finalists)]
        best = ranked[0] if ranked else present
        replays: dict[int, float] = {}
        if ranked and inputs.recent and self._worth(best[0], present[0]):
            for i, (_, _, shapes) in enumerate(finalists):
                plan = place(shapes, inputs.num_devices, inputs.plan, inputs.lost)
                replays[i] = rollout(
                    self.cost, self.tiers.values(), plan, inputs.recent, inputs.loads, self.resident_tp
                )
        candidates: list[Candidate] = []
        values: list[float] = []
        for i, (score, prediction, shapes) in enumerate(finalists):
            replayed = replays.get(i)
            value = score if replayed is None else score + config.replay_weight * (replayed - score)
            values.append(value)
            candidates.append(
                Candidate(
                    shapes_text(shapes), prediction.goodput, score, prediction.load, prediction.attainment, replayed
                )
            )
        chosen = max(range(len(values)), key=lambda i: (values[i], i == 0))
        gain = values[chosen] - values[0]
        if chosen == 0 or gain < config.hysteresis:
            reason = f"stays: the best other plan would gain {max(gain, 0.0):.1%} of the offered goodput"
            return Decision(inputs.time_s, inputs, tuple(candidates), inputs.plan, False, reason)
        plan = place(finalists[chosen][2], inputs.num_devices, inputs.plan, inputs.lost)
        reason = (
            f"{candidates[chosen].plan} is predicted to meet {values[chosen]:.1%} of the offered goodput,"
            f" {candidates[0].plan} {values[0]:.1%}"
        )
        return Decision(inputs.time_s, inputs, tuple(candidates), plan, plan != inputs.plan, reason)

    def _worth(self, best: float, present: float) -> bool:
        """Whether a replay could lead to a switch."""
        return best - present > 0.5 * self.config.hysteresis

    def _key(self, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
        return tuple(sorted(shapes, key=str))

    def _plans(
        self, num_devices: int, lost: tuple[int, ...], tiers: tuple[str, ...], allowed: tuple[str, ...]
    ) -> tuple[tuple[Shape, ...], ...]:
        key = num_devices, lost, tiers, allowed
        found = self._candidates.get(key)
        if found is None:
            devices = num_devices - len(lost)
            plans = list(mixed_plans(devices, self.tps, tiers))
            if self.config.splits:
                plans += split_plans(devices, self.tps)
            if lost:
                plans = [shapes for shapes in plans if fits(shapes, num_devices, lost)]
            if allowed:
                plans = [p for p in plans if shapes_text([Shape(s.tp, s.role) for s in p]) in allowed]
            found = self._candidates[key] = tuple(plans)
        return found

    def _scored(
        self, model: QueueingModel, shapes: tuple[Shape, ...], offered: float
    ) -> tuple[float, Prediction, tuple[Shape, ...]]:
        config = self.config
        prediction = model.predict(shapes)
        score = prediction.goodput / offered
        # Where the load as it is does not fit, a larger one says nothing new.
        more = model.predict(shapes, config.headroom).goodput / offered / config.headroom
        return score + config.headroom_weight * (more - score), prediction, shapes


def _diverse(
    ranked: Sequence[tuple[float, Prediction, tuple[Shape, ...]]], count: int
) -> list[tuple[float, Prediction, tuple[Shape, ...]]]:
    """The best of every layout, whatever its tiers; the first `count` of them."""
    chosen: dict[tuple[tuple[int, str], ...], tuple[float, Prediction, tuple[Shape, ...]]] = {}
    for item in ranked:
        layout = tuple(sorted((shape.tp, shape.role) for shape in item[2]))
        chosen.setdefault(layout, item)
        if len(chosen) == count:
            break
    return list(chosen.values())


def _plan_from_json(values: Mapping[str, Any]) -> CellPlan:
    return CellPlan(tuple(InstancePlan(tuple(i["devices"]), i["role"], tuple(i["tiers"])) for i in values["instances"]))
