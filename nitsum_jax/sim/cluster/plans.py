"""What each cell of a cluster is for: all tiers, those that somebody gives it, or those that the fleet planner does."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.planning.decision import Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.estimate import WorkloadEstimator
from nitsum_jax.control.planning.fleet.decide import decide
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.planning.rollout import Arrival
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.meshes.layout import InstanceSpec, Layout
from nitsum_jax.sim.workloads.workload import Workload


@dataclasses.dataclass(frozen=True, slots=True)
class CellPlans:
    """The cells of a cluster.

    Attributes:
      layouts: of every cell.
      takes: the tiers whose requests each takes; None: all.
    """

    layouts: tuple[Layout, ...]
    takes: tuple[frozenset[str] | None, ...]

    def __len__(self) -> int:
        return len(self.layouts)

    def places(self, tiers: TierSet) -> dict[str, tuple[int, ...]]:
        """Which cells take the requests of each tier; one that no cell is for goes to all."""
        found = {}
        for tier in tiers.names:
            its = tuple(n for n, takes in enumerate(self.takes) if takes is None or tier in takes)
            found[tier] = its or tuple(range(len(self)))
        return found

    def __str__(self) -> str:
        """How many cells are for what, such as `chat: 6 of tp1x2; all tiers: 2 of tp2`."""
        alike = collections.Counter(
            ("all tiers" if takes is None else ", ".join(sorted(takes)), layout.without_tiers().unplaced)
            for layout, takes in zip(self.layouts, self.takes, strict=True)
        )
        return "; ".join(f"{names}: {count} of {layout}" for (names, layout), count in alike.items())


def shared(cells: int, layout: Layout) -> CellPlans:
    """Every cell takes every tier."""
    return CellPlans((layout,) * cells, (None,) * cells)


def dedicated(cells: int, layout: Layout, own: Mapping[str, tuple[int, Layout]], tiers: TierSet) -> CellPlans:
    """Some cells take one tier each; the others take the tiers that are left.

    Args:
      cells: how many there are.
      layout: of the others.
      own: by tier, how many cells take its requests and no others, and the layout of these; these cells come first.
      tiers: all of them.
    """
    layouts = [plan for count, plan in own.values() for _ in range(count)]
    takes = [frozenset({tier}) for tier, (count, _) in own.items() for _ in range(count)]
    rest = cells - len(layouts)
    others = frozenset(tiers.names).difference(own)
    return CellPlans((*layouts, *(layout,) * rest), (*takes, *(others,) * rest))


def planned(cells: int, layout: Layout, devices: int, decision: Decision) -> CellPlans:
    """Cells as a plan for all their devices together has them: each takes the tiers that its instances are kept for.

    Args:
      cells: how many there are.
      layout: of a cell to which the plan gives nothing.
      devices: of each.
      decision: see `ask_planner`.
    """
    there: list[list[InstanceSpec]] = [[] for _ in range(cells)]
    for instance in decision.choice.instances:
        first = instance.devices[0] // devices * devices
        local = tuple(device - first for device in instance.devices)
        there[first // devices].append(dataclasses.replace(instance, devices=local))
    layouts = tuple(Layout(tuple(found)) if found else layout for found in there)
    return CellPlans(layouts, tuple(_tiers_of(one.instances) for one in layouts))


def _tiers_of(instances: Sequence[InstanceSpec]) -> frozenset[str] | None:
    if any(not instance.tiers for instance in instances):
        return None
    return frozenset(tier for instance in instances for tier in instance.tiers)


def ask_planner(
    workload: Workload, tiers: TierSet, cost: CostModel, cells: int, layout: Layout, devices: int
) -> Decision:
    """What the fleet planner would have all cells be, if it had watched this workload with every cell for every tier.

    Args:
      workload: what comes to all cells together: as a planner can only wish for, what is still to come.
      tiers: their targets.
      cost: what steps take.
      cells: how many there are.
      layout: of each.
      devices: of each.
    """
    watched = WorkloadEstimator(tiers.names)
    for request in workload.requests:
        watched.arrived(request.arrival_s, request.tier, request.prompt_tokens)
        watched.finished(request.arrival_s, request.tier, request.output_tokens)
    tps = tuple(tp for tp in cost.tps if tp <= devices)
    planner = Planner(cost, tiers, PlannerConfig(splits=False, tps=tps, hysteresis=0.0))  # nothing runs yet
    since_s = workload.seconds - planner.replay_s
    recent = tuple(
        Arrival(request.arrival_s, request.tier, request.prompt_tokens, request.output_tokens)
        for request in workload.requests
        if request.arrival_s >= since_s
    )
    everywhere = Layout(
        tuple(
            dataclasses.replace(instance, devices=tuple(cell * devices + device for device in instance.devices))
            for cell in range(cells)
            for instance in layout.instances
        )
    )
    inputs = PlanInputs(workload.seconds, everywhere, cells * devices, (), watched.loads(workload.seconds), recent)
    return decide(planner, inputs, devices)
