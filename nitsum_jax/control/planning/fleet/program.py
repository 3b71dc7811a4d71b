"""How many instances of which kind a cell of many nodes should have: an integer program.

A kind is a TP and the tiers that it is kept for.  What one instance of a kind serves is tabulated by the queueing
estimate at some operating points: mixtures of its tiers, each at some loads.  The program chooses how many instances
there are of each kind (whole numbers) and at which points they run (a mixture of points: the concave envelope of the
table), so that the weighted goodput is largest,

- for the load as it is and, at the same time, for a larger one (the same instances, other points), weighted as the
  planner weighs them;
- with no more requests of a tier than come;
- with nodes that keep what they have, and nodes whose devices are cut anew by the buddy rule (see `fleet_nodes`), each
  device of the latter at a price.

Its size does not depend on the number of devices, so HiGHS takes tens of milliseconds for 16 devices and for 512.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, sparse

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import MIXED, Shape
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.fleet.nodes import Node
from nitsum_jax.control.planning.queueing import QueueingModel
from nitsum_jax.control.tiers import Tier

_LEVELS = (0.3, 0.5, 0.65, 0.75, 0.85, 0.95, 1.1, 1.5)
_TILTS = (4.0, 16.0)
_USE = 1e-4  # what a device in use is worth when nothing is gained by it, as a share of the offered goodput


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """An instance at work.

    Attributes:
      shape: its kind.
      rates: requests a second that it gets, by tier.
      goodput: weighted requests a second that meet their targets.
    """

    shape: Shape
    rates: tuple[float, ...]
    goodput: float


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """A load that the cell should be good for.

    Attributes:
      scale: multiple of the load.
      weight: of its goodput, as a share of what comes, in the objective.
    """

    scale: float
    weight: float


def tier_runs(tiers: Sequence[str]) -> list[tuple[str, ...]]:
    """Tiers that an instance may be kept for: neighbours in order of tightness; empty for all of them."""
    count = len(tiers)
    return [
        () if end - start == count else tuple(tiers[start:end])
        for start in range(count)
        for end in range(start + 1, count + 1)
    ]


def operating_points(
    cost: CostModel,
    tiers: Mapping[str, Tier],
    loads: Sequence[TierLoad],
    order: Sequence[str],
    tps: Sequence[int],
    num_devices: int,
    resident_tp: int | None,
) -> list[Point]:
    """The table of the program.

    Args:
      cost: what steps take.
      tiers: targets.
      loads: of the cell.
      order: names of the tiers with a load, the tightest first.
      tps: TPs to choose from.
      num_devices: of the cell: instances of a kind share a queue, taken to be that of half the cell.
      resident_tp: as of `QueueingModel`.
    """
    by_name = {load.tier: load for load in loads}
    points = []
    for run in tier_runs(order):
        names = run or tuple(order)
        for tilt in _tilts(names):
            mixed = [
                dataclasses.replace(by_name[name], rate=by_name[name].rate * factor)
                for name, factor in zip(names, tilt, strict=True)
            ]
            model = QueueingModel(cost, tiers, mixed, resident_tp=resident_tp)
            for tp in tps:
                pool = max(1, num_devices // (2 * tp))
                shapes = [Shape(tp, tiers=run)] * pool
                trickle = 1e-3 * pool / sum(load.rate for load in mixed)
                load = model.predict(shapes, trickle).load
                if load <= 0:  # it can hold no time per token
                    continue
                for level in _LEVELS:
                    scale = trickle * level / load
                    rates = {part.tier: part.rate * scale / pool for part in mixed}
                    goodput = model.predict(shapes, scale).goodput / pool
                    points.append(Point(shapes[0], tuple(rates.get(name, 0.0) for name in order), goodput))
    return points


def _tilts(names: Sequence[str]) -> list[tuple[float, ...]]:
    found = [(1.0,) * len(names)]
    if len(names) > 1:
        for i in range(len(names)):
            found += [tuple(tilt if j == i else 1.0 for j in range(len(names))) for tilt in _TILTS]
    return found


def solve(
    points: Sequence[Point],
    rates: Sequence[float],
    offered: float,
    scenarios: Sequence[Scenario],
    nodes: Sequence[Node],
    tps: Sequence[int],
    price: float,
    counts: Mapping[int, int] | None = None,
) -> tuple[Shape, ...] | None:
    """Instances for these nodes.

    Args:
      points: the table; at least one.
      rates: requests a second of each tier, in the order of the points' rates.
      offered: weighted requests a second that come.
      scenarios: loads.
      nodes: of the cell, with what they have.
      tps: TPs of the points.
      price: of changing all devices, as a share of the offered goodput.
      counts: instances of each TP that there must be; None: free.

    Returns:
      Shapes, largest TP first; None if the program has no solution.
    """
    shapes = list(dict.fromkeys(point.shape for point in points))
    of_shape = {shape: i for i, shape in enumerate(shapes)}
    classes: dict[tuple, list[Node]] = collections.defaultdict(list)
    for node in nodes:
        classes[node.kinds, node.lost, node.size].append(node)
    groups = list(classes.values())
    devices = sum(node.size - len(node.lost) for node in nodes)
    # Columns: instances by shape, nodes kept by class, new instances by TP, then points for every scenario.
    kept_at, fresh_at = len(shapes), len(shapes) + len(groups)
    points_at = fresh_at + len(tps)
    width = points_at + len(points) * len(scenarios)
    program = _Rows(width)
    cost = np.zeros(width)
    upper = np.full(width, np.inf)
    for i, shape in enumerate(shapes):
        cost[i] = -_USE * shape.tp / devices
    for g, group in enumerate(groups):
        held = sum(kind[0] * count for kind, count in group[0].kinds)
        known = bool(held) and all(role == MIXED and tp in tps for (tp, role), _ in group[0].kinds)
        upper[kept_at + g] = len(group) if known else 0
        cost[kept_at + g] = -price * (group[0].size - len(group[0].lost)) / devices
    for s, scenario in enumerate(scenarios):
        base = points_at + s * len(points)
        cost[base : base + len(points)] = [
            -scenario.weight * point.goodput / (offered * scenario.scale) for point in points
        ]
        for shape, i in of_shape.items():
            mine = [(base + j, 1.0) for j, point in enumerate(points) if point.shape == shape]
            program.add([*mine, (i, -1.0)], -np.inf, 0.0)
        for t, rate in enumerate(rates):
            program.add(
                [(base + j, p.rates[t]) for j, p in enumerate(points) if p.rates[t]], 0.0, rate * scenario.scale
            )
    for f, tp in enumerate(tps):
        mine = [(i, 1.0) for i, shape in enumerate(shapes) if shape.tp == tp]
        kept = [(kept_at + g, -float(dict(group[0].kinds).get((tp, MIXED), 0))) for g, group in enumerate(groups)]
        program.add([*mine, *kept, (fresh_at + f, -1.0)], 0.0, 0.0)
        if counts is not None:
            program.add(mine, counts.get(tp, 0), counts.get(tp, 0))
        # New instances fit the runs of the nodes that are not kept.
        new = [(fresh_at + h, float(other // tp)) for h, other in enumerate(tps) if other >= tp]
        runs = [float(group[0].runs(tp)) for group in groups]
        total = sum(run * len(group) for run, group in zip(runs, groups, strict=True))
        program.add([*new, *((kept_at + g, run) for g, run in enumerate(runs))], -np.inf, total)
    whole = np.zeros(width)
    whole[:points_at] = 1
    found = optimize.milp(
        cost,
        integrality=whole,
        bounds=optimize.Bounds(0, upper),
        constraints=program.constraint(),
        options={"node_limit": 100, "mip_rel_gap": 2e-4},  # limits that do not depend on the clock
    )
    if found.x is None:
        return None
    chosen = [shape for shape, x in zip(shapes, found.x, strict=False) for _ in range(round(x))]
    return tuple(sorted(chosen, key=lambda shape: (-shape.tp, shape.tiers)))


class _Rows:
    """Constraints, row by row."""

    def __init__(self, width: int):
        self._width = width
        self._entries: list[tuple[int, int, float]] = []
        self._bounds: list[tuple[float, float]] = []

    def add(self, entries: Sequence[tuple[int, float]], low: float, high: float) -> None:
        row = len(self._bounds)
        self._entries += [(row, column, value) for column, value in entries]
        self._bounds.append((low, high))

    def constraint(self) -> optimize.LinearConstraint:
        rows, columns, values = zip(*self._entries, strict=True)
        matrix = sparse.csr_array((values, (rows, columns)), shape=(len(self._bounds), self._width))
        bounds: npt.NDArray[np.float64] = np.array(self._bounds)
        return optimize.LinearConstraint(matrix, bounds[:, 0], bounds[:, 1])
