"""Which plan a cell of many nodes should have: 16 to 512 devices and more in well under a second.

The candidates of one node cannot be listed for many.  So a plan is a count of instances of each kind (see
`fleet_nodes`), and the best counts are found in three steps:

1. Starts: an integer program over kinds and operating points (`fleet_program`), once with the price of change and
   once without; the best plans of one node, repeated; and splits of the whole cell between prefill and decode.
2. Descent: from the best starts, devices go from one kind to another, in large portions first and then in small ones,
   as long as that gains.  Plans are judged by the queueing estimate of the whole cell, as those of one node are: the
   program pools no queues, this does.
3. Replay: the best few and the present plan serve the last requests once more, in a miniature: a cell of
   `MINIATURE` nodes with instances in the plan's proportions, and as many of the requests as such a cell would get.
4. Nodes: the winner's instances are laid on the devices so that as many nodes as possible keep all they have.

A plan is worth its predicted share of the offered goodput less `hysteresis` for the share of the devices that change,
so that a few nodes are changed for a small gain and all only for a large one.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import DECODE, MIXED, PREFILL, Shape, shapes_text
from nitsum_jax.control.planning.candidates import mixed_plans
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.fleet.nodes import (
    Kind,
    changed_devices,
    fits,
    kinds_of,
    nodes_of,
    place_fleet,
    room_for,
    runs_of,
)
from nitsum_jax.control.planning.fleet.program import Scenario, operating_points, solve, tier_runs
from nitsum_jax.control.planning.queueing import Prediction
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout, parse_shapes

MINIATURE = 2
"""Nodes of the cell in which plans are replayed."""
Counts = collections.Counter[Shape]
Score = Callable[[Sequence[Shape]], tuple[float, Prediction]]
"""Predicted share of the offered goodput (with headroom) of a plan, and the prediction that it is made from."""


Replay = Callable[[Sequence[Shape], int], float]
"""Share of the last requests that these instances meet, on a cell of so many devices."""


@dataclasses.dataclass(frozen=True, slots=True)
class FleetConfig:
    """How far a search goes.

    Attributes:
      node_plans: plans of one node that are tried in all nodes; of more only those that keep no instances for tiers.
      descents: starts that are improved.
      evaluations: plans that are judged at the most while improving one.
      replay_weight: of a replay against the prediction.
      finalists: plans that are replayed, besides the present one.
      noise: least gain for which anything changes, as a share of the hysteresis.
      allowed: allowed layouts that are looked at, if there is such a list.
    """

    node_plans: int = 256
    descents: int = 2
    evaluations: int = 240
    replay_weight: float = 0.6
    finalists: int = 3
    noise: float = 0.25
    allowed: int = 16


@dataclasses.dataclass(frozen=True, slots=True)
class FleetOption:
    """A plan that was considered.

    Attributes:
      counts: its instances: shapes and how many of each, largest TP first.
      score: predicted share of the offered goodput.
      value: less what the change costs, and with what a replay said.
      prediction: of the load as it is.
      replayed: share of the replayed requests that it met, if it was replayed.
    """

    counts: tuple[tuple[Shape, int], ...]
    score: float
    value: float
    prediction: Prediction
    replayed: float | None = None

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Its instances, largest TP first."""
        return tuple(shape for shape, count in self.counts for _ in range(count))

    def __str__(self) -> str:
        return shapes_text(self.shapes)


@dataclasses.dataclass(frozen=True, slots=True)
class FleetChoice:
    """What a search came to.

    Attributes:
      options: the present plan, then the best others, best first.
      plan: to have; the present one if nothing is worth a change.
      reason: one line.
    """

    options: tuple[FleetOption, ...]
    plan: Layout
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class FleetCell:
    """The cell that a plan is for.

    Attributes:
      plan: in force.
      num_devices: of the cell.
      node: devices of a node.
      lost: devices that cannot be used.
      allowed: texts of the layouts that may be used (see `PlanInputs`); empty: all.
    """

    plan: Layout
    num_devices: int
    node: int
    lost: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()


def search(
    cell: FleetCell,
    cost: CostModel,
    tiers: Mapping[str, Tier],
    loads: Sequence[TierLoad],
    order: Sequence[str],
    tps: Sequence[int],
    score: Score,
    *,
    hysteresis: float,
    scenarios: Sequence[Scenario],
    splits: bool = True,
    replay: Replay | None = None,
    config: FleetConfig = FleetConfig(),
) -> FleetChoice:
    """The plan for a cell of many nodes.

    Args:
      cell: what there is.
      cost: what steps take.
      tiers: targets.
      loads: of the tiers.
      order: names of the tiers with a load, the tightest first.
      tps: TPs that may be used, powers of two, the least first.
      score: judges plans of the whole cell.
      hysteresis: what changing all devices costs, as a share of the offered goodput.
      scenarios: loads that the integer program weighs, alike to what `score` does.
      splits: whether plans with prefill and decode apart are considered.
      replay: runs the last requests once more; None: there are none.
      config: how far to go.
    """
    found = _Search(cell, cost, tiers, loads, order, tps, score, hysteresis, scenarios, splits, config)
    return found.run(replay)


class _Search:
    def __init__(
        self,
        cell: FleetCell,
        cost: CostModel,
        tiers: Mapping[str, Tier],
        loads: Sequence[TierLoad],
        order: Sequence[str],
        tps: Sequence[int],
        score: Score,
        hysteresis: float,
        scenarios: Sequence[Scenario],
        splits: bool,
        config: FleetConfig,
    ):
        self.cell = cell
        self.cost = cost
        self.tiers = tiers
        self.loads = [load for load in loads if load.tier in order]
        self.order = tuple(order)
        self.tps = tuple(tp for tp in tps if tp <= cell.node)
        self.score = score
        self.hysteresis = hysteresis
        self.scenarios = scenarios
        self.splits = splits
        self.config = config
        self.nodes = nodes_of(cell.plan, cell.num_devices, cell.node, cell.lost)
        self.runs = runs_of(self.nodes, self.tps)
        self.present = kinds_of(i.shape for i in cell.plan.instances)
        self.seen: dict[tuple[tuple[Shape, int], ...], FleetOption] = {}
        self.allowed = [kinds_of(parse_shapes(text)) for text in cell.allowed[: config.allowed]]

    def run(self, replay: Replay | None) -> FleetChoice:
        cell, least = self.cell, self.config.noise * self.hysteresis
        present = self._judge(collections.Counter(cell.plan.shapes))
        for start in list(self._starts()):
            self._judge(start)
        for option in self._different(self.config.descents):
            self._improve(option)
        best = [option for option in self._different(self.config.finalists + 1) if option is not present]
        if replay is not None and best and (best[0].value - present.value > least / 2):
            options = [self._replayed(o, replay) for o in (present, *best[: self.config.finalists])]
            present, best = options[0], sorted(options[1:], key=_rank)
        gain = best[0].value - present.value if best else 0.0
        options = [present, *best]
        if not best or (gain < least and not self._broken()):
            reason = f"stays: the best other plan would gain {max(gain, 0.0):.1%} of the offered goodput"
            return FleetChoice(tuple(options), cell.plan, reason)
        plan = place_fleet(best[0].shapes, cell.num_devices, cell.node, cell.plan, cell.lost)
        reason = (
            f"{best[0]} is predicted to meet {best[0].value:.1%} of the offered goodput (less the cost of the change),"
            f" {present} {present.value:.1%}; {changed_devices(cell.plan, plan)} of {cell.num_devices} devices change"
        )
        return FleetChoice(tuple(options), plan, reason)

    def _different(self, count: int) -> list[FleetOption]:
        """The best plans so far, one of every layout, whatever its tiers."""
        found: dict[frozenset[tuple[Kind, int]], FleetOption] = {}
        for option in sorted(self.seen.values(), key=_rank):
            found.setdefault(frozenset(kinds_of(dict(option.counts)).items()), option)
            if len(found) == count:
                break
        return list(found.values())

    def _replayed(self, option: FleetOption, replay: Replay) -> FleetOption:
        devices = min(MINIATURE * self.cell.node, self.cell.num_devices)
        met = replay(miniature(option.counts, devices), devices)
        return dataclasses.replace(
            option, value=option.value + self.config.replay_weight * (met - option.score), replayed=met
        )

    def _broken(self) -> bool:
        """Whether the present plan has lost devices in use, or leaves usable ones idle."""
        used = {device for instance in self.cell.plan.instances for device in instance.devices}
        lost = not used.isdisjoint(self.cell.lost)
        return lost or (not self.allowed and room_for(self.tps[0], self.present, self.runs) > 0)

    # ---- plans

    def _judge(self, counts: Counts) -> FleetOption:
        key = tuple(sorted(counts.items(), key=lambda item: (-item[0].tp, item[0].role, item[0].tiers)))
        found = self.seen.get(key)
        if found is None:
            score, prediction = self.score([shape for shape, count in key for _ in range(count)])
            found = FleetOption(key, score, score - self.hysteresis * self._changed(counts), prediction)
            self.seen[key] = found
        return found

    def _changed(self, counts: Counts) -> float:
        """Share of the devices that must change at least."""
        gone = self.present - kinds_of(counts)
        return sum(tp * count for (tp, _), count in gone.items()) / self.cell.num_devices

    def _possible(self, kinds: Mapping[Kind, int]) -> bool:
        return fits(kinds, self.runs) and (not self.allowed or kinds in self.allowed)

    def _filled(self, shapes: Iterable[Shape]) -> Counts | None:
        """The shapes, with devices that they leave idle put to use: as more of the same, else for all tiers."""
        counts = collections.Counter(shapes)
        if not self.allowed:
            same = sorted(counts, key=lambda shape: (-shape.tp, -counts[shape], shape.tiers))
            for shape in (*same, *(Shape(tp) for tp in reversed(self.tps))):
                room = room_for(shape.tp, kinds_of(counts), self.runs)
                if room > 0:
                    counts[shape] += room
        return counts if self._possible(kinds_of(counts)) else None

    # ---- starts

    def _starts(self) -> Iterator[Counts]:
        alive = set(range(self.cell.num_devices)).difference(self.cell.lost)
        there = tuple(i.shape for i in self.cell.plan.instances if alive.issuperset(i.devices))
        for shapes in (there, *self._solved(), *self._repeated(), *(self._split() if self.splits else ())):
            counts = self._filled(shapes)
            if counts is not None:
                yield counts

    def _solved(self) -> Iterator[tuple[Shape, ...]]:
        resident = self.tps[0]
        points = operating_points(
            self.cost, self.tiers, self.loads, self.order, self.tps, self.cell.num_devices, resident
        )
        if not points:
            return
        by_name = {load.tier: load.rate for load in self.loads}
        rates = [by_name[name] for name in self.order]
        offered = sum(rate * self.tiers[name].weight for name, rate in by_name.items())
        fixed: list[Mapping[int, int] | None] = [None]
        if self.allowed:
            mixed = [kinds for kinds in self.allowed if all(role == MIXED for _, role in kinds)]
            fixed = [{tp: count for (tp, _), count in kinds.items()} for kinds in mixed]
        for counts in fixed:
            for price in (self.hysteresis, 0.0) if counts is None else (0.0,):
                found = solve(points, rates, offered, self.scenarios, self.nodes, self.tps, price, counts)
                if found:
                    yield found

    def _repeated(self) -> Iterator[tuple[Shape, ...]]:
        """Plans of one node in every node."""
        node = min(self.cell.node, self.cell.num_devices)
        times = len(self.nodes)
        plans = list(mixed_plans(node, self.tps, self.order))
        if len(plans) > self.config.node_plans:
            plans = [shapes for shapes in plans if not any(shape.tiers for shape in shapes)]
        for shapes in plans:
            kinds = collections.Counter({kind: count * times for kind, count in kinds_of(shapes).items()})
            if self._possible(kinds):
                yield shapes * times

    def _split(self) -> Iterator[tuple[Shape, ...]]:
        """One TP for prefill and one for decode, in sixteen proportions."""
        if self.allowed:
            for kinds in self.allowed:
                if any(role != MIXED for _, role in kinds):
                    yield tuple(Shape(tp, role) for (tp, role), count in kinds.items() for _ in range(count))
            return
        for prefill in self.tps:
            for decode in self.tps:
                unit = max(prefill, decode)
                units = self.runs[unit]
                for first in sorted({max(1, round(units * i / 16)) for i in range(1, 16)}):
                    if first < units:
                        yield (
                            *(Shape(prefill, PREFILL),) * (first * unit // prefill),
                            *(Shape(decode, DECODE),) * ((units - first) * unit // decode),
                        )

    # ---- descent

    def _improve(self, option: FleetOption) -> None:
        """Moves devices between kinds as long as that gains."""
        usable = self.runs[self.tps[0]] * self.tps[0]
        portion = 1 << max(0, (usable // 4).bit_length() - 1)
        left = self.config.evaluations
        while portion >= self.tps[0] and left > 0:
            better = option
            for counts in self._neighbours(option, portion):
                left -= 1
                found = self._judge(counts)
                if _rank(found) < _rank(better):
                    better = found
                if left <= 0:
                    break
            if better is option or better.value - option.value < 1e-4:
                portion //= 2
            option = better

    def _neighbours(self, option: FleetOption, portion: int) -> Iterator[Counts]:
        counts = collections.Counter(dict(option.counts))
        split = any(shape.role != MIXED for shape in counts)
        targets = list(counts) if split else [Shape(tp, tiers=run) for tp in self.tps for run in tier_runs(self.order)]
        for source in sorted(counts, key=str):
            for target in targets:
                if source == target or max(source.tp, target.tp) > portion or counts[source] * source.tp < portion:
                    continue
                moved = counts.copy()
                moved[source] -= portion // source.tp
                moved[target] += portion // target.tp
                if not moved[source]:
                    del moved[source]
                if split and len(moved) < 2:
                    continue
                if self._possible(kinds_of(moved)):
                    yield moved


def miniature(counts: Sequence[tuple[Shape, int]], devices: int) -> tuple[Shape, ...]:
    """A cell of so many devices with instances in these proportions, as nearly as that goes.

    Every role that occurs has an instance.
    """
    scale = devices / sum(shape.tp * count for shape, count in counts)
    wanted = {shape: count * scale for shape, count in counts}
    given = dict.fromkeys(wanted, 0)
    left = devices
    for role in sorted({shape.role for shape in wanted}):
        first = max((s for s in wanted if s.role == role), key=lambda s: (wanted[s] * s.tp, s.tp, s.tiers))
        given[first] = 1
        left -= first.tp
    while fitting := [shape for shape in wanted if shape.tp <= left]:
        chosen = max(fitting, key=lambda s: ((wanted[s] - given[s]) * s.tp, s.tp, s.tiers))
        given[chosen] += 1
        left -= chosen.tp
    return tuple(shape for shape, count in given.items() for _ in range(count))


def _rank(option: FleetOption) -> tuple[float, float, list[tuple[int, str, int]]]:
    """Best first; of equal ones the one with more room."""
    return (
        -round(option.value, 9),
        option.prediction.load,
        [(shape.tp, str(shape), count) for shape, count in option.counts],
    )
