"""Which plan a cell should have: search over layouts, roles and tier placement.

The present plan is asked first: the requests that wait, and then those of the last seconds once more, coming a little
faster than they did, run through the model of the cell.  If they meet their targets (and the estimate says nothing
else) it stays, and nothing else is looked at.  A planner over its budget asks the estimate first, which costs
little, and stays unless that finds a plan far better than the present one.

If not, every candidate gets a goodput predicted by the queueing estimate at the load as it is and at a larger one.
The best few, some of every kind, are then replayed with the same requests; one that misses more than the best so far
is given up at once.  The replay decides, and of those that do alike the estimate; far into overload, where a replay
ends before the queues have grown as long as requests wait, the estimate counts for what it does not show.  A plan is
left only for one that saves more requests than it loses by a margin, and by more than chance.  Pure: a `PlanInputs`
and the same settings always give the same decision, so one can be replayed from a log.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import MIXED, Shape, fits, kinds, place, shapes_text
from nitsum_jax.control.planning.candidates import joint_plans, mixed_plans, split_plans
from nitsum_jax.control.planning.decision import Candidate, Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.fleet.decide import decide as decide_fleet
from nitsum_jax.control.planning.queueing import Prediction, QueueingModel
from nitsum_jax.control.planning.rollout import Replay, rollout
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import parse_shapes


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

    @property
    def replay_s(self) -> float:
        """Seconds of arrivals that a replay is made of."""
        patience_s = max((tier.ttft_ms for tier in self.tiers.values()), default=0.0) / 1000
        return min(40.0, max(10.0, self.config.replay_ttfts * patience_s))

    def decide(self, inputs: PlanInputs) -> Decision:
        """The plan for these inputs."""
        if inputs.num_devices > self.cost.profile.devices:
            return decide_fleet(self, inputs)
        config = self.config
        model = QueueingModel(self.cost, self.tiers, inputs.loads, resident_tp=self.resident_tp)
        if not model.tiers:
            return Decision(inputs.time_s, inputs, (), inputs.plan, False, "no request has come yet")
        offered = model.offered
        present = self._scored(model, inputs.plan.shapes, offered)
        lost = not set(inputs.lost).isdisjoint(d for i in inputs.plan.instances for d in i.devices)
        ranked = None
        if inputs.thrifty and not lost:
            # No score is above 1: beside a plan near it nothing need be looked at.
            near = present[0] > 1 - config.clear_gain
            ranked = [] if near else self._ranked(inputs, model, present, offered)
            gain = max((item[0] for item in ranked), default=0.0) - present[0]
            if gain < config.clear_gain:
                reason = f"stays: planned a lot lately, and the estimate finds no clear gain ({max(gain, 0.0):.1%})"
                seen = tuple(map(_candidate, [present, *_diverse(ranked, config.finalists)]))
                return Decision(inputs.time_s, inputs, seen, inputs.plan, False, reason, len(ranked))
        first = None
        if inputs.recent:
            first = self._replay(inputs, present[2], math.inf)
            if first.share >= config.satisfied and present[0] >= config.trusted and not lost:
                reason = f"stays: of the last requests, come faster, {first.share:.1%} would meet their targets"
                alone = (_candidate(present, first),)
                return Decision(inputs.time_s, inputs, alone, inputs.plan, False, reason, first.count)
        if ranked is None:
            ranked = self._ranked(inputs, model, present, offered)
        finalists = [present, *_diverse(ranked, config.finalists)]
        replays: list[Replay | None] = [first]
        covered = self._covered(inputs)
        hidden = self._hidden(inputs, covered)
        weight = 1 - covered * (1 - config.estimate_weight)
        least, known = (first.missed, present[0]) if first is not None else (math.inf, 0.0)
        for score, _, shapes in finalists[1:]:
            replay = None
            if inputs.recent:
                more = hidden * (score - known)
                replay = self._replay(inputs, shapes, max(0.0, least + more))
                if not replay.given_up and replay.missed < least + more:
                    least, known = replay.missed, score
            replays.append(replay)
        values = [
            item[0] if replay is None else replay.share + weight * (item[0] - replay.share)
            for item, replay in zip(finalists, replays, strict=True)
        ]
        candidates = tuple(map(_candidate, finalists, replays))
        work = len(ranked) + sum(replay.count for replay in replays if replay is not None)
        chosen = max(range(len(values)), key=lambda i: (not _given_up(replays[i]), values[i], i == 0))
        gain = values[chosen] - values[0]
        unseen = hidden * (finalists[chosen][0] - present[0])
        better = chosen > 0 and gain >= config.hysteresis and self._certain(first, replays[chosen], unseen)
        if better and gain < 2 * config.hysteresis and inputs.recent and not lost:
            unpressed = self._replay(inputs, present[2], math.inf, pressure=1.0)
            work += unpressed.count
            better = unpressed.share < config.satisfied
        if not better:
            reason = f"stays: the best other plan would gain {max(gain, 0.0):.1%} of the offered goodput"
            return Decision(inputs.time_s, inputs, candidates, inputs.plan, False, reason, work)
        plan = place(finalists[chosen][2], inputs.num_devices, inputs.plan, inputs.lost)
        reason = (
            f"{candidates[chosen].plan} is predicted to meet {values[chosen]:.1%} of the offered goodput,"
            f" {candidates[0].plan} {values[0]:.1%}"
        )
        return Decision(inputs.time_s, inputs, candidates, plan, plan != inputs.plan, reason, work)

    def _ranked(self, inputs: PlanInputs, model: QueueingModel, present: "_Scored", offered: float) -> list["_Scored"]:
        """All plans but the present one, the best by the estimate first."""
        now = self._key(present[2])
        scored: dict[tuple[Shape, ...], _Scored] = {}
        for shapes in self._plans(inputs.num_devices, inputs.lost, model.tiers, inputs.allowed):
            key = self._key(shapes)
            if key not in scored and key != now:
                scored[key] = self._scored(model, shapes, offered)
        return sorted(scored.values(), key=lambda item: (-item[0], item[1].load, shapes_text(item[2])))

    def _replay(
        self, inputs: PlanInputs, shapes: tuple[Shape, ...], most_missed: float, pressure: float | None = None
    ) -> Replay:
        plan = place(shapes, inputs.num_devices, inputs.plan, inputs.lost)
        longest_ms = 1000 * self.config.replay_patience * (inputs.time_s - inputs.recent[0].time_s)
        tiers = {n: dataclasses.replace(t, ttft_ms=min(t.ttft_ms, longest_ms)) for n, t in self.tiers.items()}
        waiting = []
        for job in inputs.waiting:
            waited_s = (inputs.time_s - job.time_s) * tiers[job.tier].ttft_ms / self.tiers[job.tier].ttft_ms
            waiting.append(dataclasses.replace(job, time_s=-waited_s))
        return rollout(
            self.cost,
            tiers.values(),
            plan,
            inputs.recent,
            inputs.loads,
            self.resident_tp,
            waiting=waiting,
            pressure=pressure or self.config.pressure,
            most_missed=most_missed,
            max_batch=inputs.max_batch,
        )

    def _covered(self, inputs: PlanInputs) -> float:
        """How far a replay tells what an overload does: it must last as long as the most patient tier in it waits.

        Where more comes than can be replayed (`PlannerConfig.replayed`), it ends before: until then every plan lives on
        the patience of its queue, and all look alike.
        """
        if len(inputs.recent) < self.config.replayed:
            return 1.0
        patience_s = max(self.tiers[name].ttft_ms for name in {arrival.tier for arrival in inputs.recent}) / 1000
        return min(1.0, (inputs.recent[-1].time_s - inputs.recent[0].time_s) / patience_s)

    def _hidden(self, inputs: PlanInputs, covered: float) -> float:
        """Requests that a replay is too short to show: times the estimate's gain, it may be worse by so many."""
        if covered == 1:
            return 0.0
        counted = (*inputs.recent[len(inputs.recent) // 4 :], *inputs.waiting)
        return (1 - covered) / max(covered, 1e-9) * sum(self.tiers[arrival.tier].weight for arrival in counted)

    def _certain(self, present: Replay | None, other: Replay | None, unseen: float) -> bool:
        """Whether the requests that one plan saves are more than those that it loses by more than chance."""
        if present is None or other is None:
            return True
        saved, lost = len(present.late - other.late), len(other.late - present.late)
        return saved - lost + unseen >= self.config.chance * math.sqrt(saved + lost)

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
                plans += joint_plans(devices, self.tps)
            if lost:
                plans = [shapes for shapes in plans if fits(shapes, num_devices, lost)]
            if allowed:
                listed = {kinds(parse_shapes(text)) for text in allowed}
                plans = [shapes for shapes in plans if kinds(shapes) in listed]
            found = self._candidates[key] = tuple(plans)
        return found

    def _scored(self, model: QueueingModel, shapes: tuple[Shape, ...], offered: float) -> "_Scored":
        config = self.config
        prediction = model.predict(shapes)
        score = prediction.goodput / offered
        # Where the load as it is does not fit, a larger one says nothing new.
        more = model.predict(shapes, config.headroom).goodput / offered / config.headroom
        return score + config.headroom_weight * (more - score), prediction, shapes


_Scored = tuple[float, Prediction, tuple[Shape, ...]]


def _candidate(scored: _Scored, replay: Replay | None = None) -> Candidate:
    score, prediction, shapes = scored
    share = None if replay is None else replay.share
    return Candidate(shapes_text(shapes), prediction.goodput, score, prediction.load, prediction.attainment, share)


def _given_up(replay: Replay | None) -> bool:
    return replay is not None and replay.given_up


def _diverse(ranked: Sequence[_Scored], count: int) -> list[_Scored]:
    """The best of every layout, whatever its tiers; the first `count` of them, with at least one of every kind.

    The estimate is better at telling plans of a kind apart than plans of different kinds.
    """
    layouts: dict[tuple[tuple[int, str], ...], _Scored] = {}
    by_kind: dict[tuple[bool, ...], _Scored] = {}
    for item in ranked:
        layouts.setdefault(kinds(item[2]), item)
        by_kind.setdefault(_kind(item[2]), item)
    best = list(layouts.values())
    chosen = best[: max(1, count - len(by_kind))]
    chosen += [item for item in by_kind.values() if not any(item is other for other in chosen)]
    chosen += [item for item in best if not any(item is other for other in chosen)]
    return sorted(chosen[:count], key=lambda item: -item[0])


def _kind(shapes: Sequence[Shape]) -> tuple[bool, ...]:
    """Whether it has instances that do one thing, some that do both, and several TPs among the latter."""
    both = {shape.tp for shape in shapes if shape.role == MIXED}
    return any(shape.role != MIXED for shape in shapes), bool(both), len(both) > 1
