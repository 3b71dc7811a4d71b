"""The policies that adaptive control is measured against, each with all the settings that its best is searched over.

| family | what it is |
|---|---|
| `static-tp1`, `static-tp2`, ... | instances of one TP |
| `static-mixed` | every layout of instances that prefill and decode, with every placement of tiers in `layouts` |
| `distserve` | prefill instances of one TP beside decode instances of one TP, hand-over between them |
| `sarathi` | instances of one TP; fixed chunk budget, first come first served |
| `apart` | the cell parted between the tiers; no request leaves its part |
| `dynamo` | one TP for prefill and one for decode; devices change their role by load |
| `flying` | all instances of the least TP, or all of the largest, by load |
| `static` | the best static layout in hindsight: those of `static-*` and `distserve`, and all with three roles |

A family is a list of policies; which of them is best is found by `search`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import DECODE, PREFILL, Shape, shapes_text
from nitsum_jax.control.planning.candidates import joint_plans, mixed_plans
from nitsum_jax.control.planning.controller import AdaptiveController, Controller
from nitsum_jax.control.planning.decision import PlannerConfig
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.scheduling.scheduler import SchedulerConfig
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.sim.policies import layouts
from nitsum_jax.sim.policies.rebalancing import AllOrNothing, RoleBalancer, RoleLimits, SwitchLimits
from nitsum_jax.sim.runs.simulation import RunPolicy

CHUNKS = (256, 512, 1024, 2048)
"""Chunk budgets that Sarathi-style policies are tried with, tokens a step."""
_FCFS = SchedulerConfig(order="fcfs", routing="least_loaded", chunk_tokens=8192, ahead_tokens=8192)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What policies are made for.

    Attributes:
      cost: what steps take.
      tiers: targets.
      num_devices: devices of the cell.
    """

    cost: CostModel
    tiers: TierSet
    num_devices: int

    def __post_init__(self) -> None:
        if not self.tps:
            raise InvalidInputError(
                f"{self.cost.profile.name} needs at least {self.cost.tps[0]} devices: there are {self.num_devices}"
            )

    @property
    def node(self) -> int:
        """Devices that a layout is made for; larger cells repeat it."""
        return layouts.node_size(self.num_devices, self.cost.profile.devices)

    @property
    def tps(self) -> tuple[int, ...]:
        """TPs of the profile that fit a node."""
        return tuple(tp for tp in self.cost.tps if tp <= self.node)

    def layout(self, shapes: tuple[Shape, ...]) -> str:
        """Text of a node's shapes in all nodes, in the order in which candidates are named."""
        return shapes_text(
            sorted(shapes * max(1, self.num_devices // self.node), key=lambda s: (s.role != PREFILL, -s.tp))
        )

    def plan(self, shapes: tuple[Shape, ...]) -> Layout:
        """A node's shapes in all nodes."""
        return layouts.plan_of(shapes, self.num_devices, self.node)


def static(
    setting: Setting, name: str, shapes: tuple[Shape, ...], scheduler: SchedulerConfig | None = None
) -> RunPolicy:
    """A layout that never changes."""
    return RunPolicy(f"{name}[{shapes_text(shapes)}]", setting.plan(shapes), scheduler or SchedulerConfig())


def static_tp(setting: Setting, tp: int) -> Iterator[RunPolicy]:
    """Instances of one TP: there is nothing to choose."""
    yield static(setting, f"static-tp{tp}", (Shape(tp),) * (setting.node // tp))


def static_mixed(setting: Setting) -> Iterator[RunPolicy]:
    """Every cut, every placement: those that the planner knows, and large instances for relaxed tiers."""
    tight_first = sorted(setting.tiers, key=lambda tier: (tier.tpot_ms, tier.ttft_ms))
    seen = set()
    known = mixed_plans(setting.node, setting.tps, [tier.name for tier in tight_first])
    more = (s for cut in layouts.cuts(setting.node, setting.tps) for s in layouts.placements(cut, setting.tiers))
    for shapes in itertools.chain(known, more):
        key = tuple(sorted(map(str, shapes)))
        if key not in seen:
            seen.add(key)
            yield static(setting, "static", tuple(shapes))


def distserve(setting: Setting) -> Iterator[RunPolicy]:
    """Every split; first come first served as published, and with our scheduler."""
    for shapes in layouts.role_splits(setting.node, setting.tps):
        yield static(setting, "distserve-fcfs", shapes, _FCFS)
        yield static(setting, "distserve", shapes)


def sarathi(setting: Setting) -> Iterator[RunPolicy]:
    """Every TP with every chunk budget."""
    for tp in setting.tps:
        for chunk in CHUNKS:
            config = SchedulerConfig(
                order="fcfs", routing="least_loaded", chunk_tokens=chunk, ahead_tokens=max(512, chunk)
            )
            yield static(setting, f"sarathi-{chunk}", (Shape(tp),) * (setting.node // tp), config)


def apart(setting: Setting) -> Iterator[RunPolicy]:
    """Every way to part the devices between two groups of tiers, with every pair of TPs."""
    for shapes in layouts.tier_splits(setting.node, setting.tps, setting.tiers):
        yield static(setting, "apart", shapes, SchedulerConfig(tiers_apart=True))


def dynamo(setting: Setting) -> Iterator[RunPolicy]:
    """Every pair of TPs, one for prefill and one for decode, begun with half of the devices each; sets of limits."""
    for prefill, decode in itertools.product(setting.tps, repeat=2):
        unit = max(prefill, decode)
        units = setting.node // unit
        if units < 2:
            continue
        shapes = (
            *(Shape(prefill, PREFILL),) * (units // 2 * unit // prefill),
            *(Shape(decode, DECODE),) * ((units - units // 2) * unit // decode),
        )
        for limits in (RoleLimits(10, 0.8, 0.8), RoleLimits(5, 0.6, 0.9), RoleLimits(30, 0.9, 0.7)):
            name = f"dynamo-{limits.interval_s:g}s-{limits.high:g}-{limits.low:g}"
            make = functools.partial(RoleBalancer, setting.cost, setting.tiers, limits, (prefill, decode))
            # Large instances are placed first, so that the small ones fill whole units.
            resident = None if prefill == decode else min(prefill, decode)
            yield dataclasses.replace(static(setting, name, shapes), controller=make, resident_tp=resident)


def flying(setting: Setting) -> Iterator[RunPolicy]:
    """Least and largest TP, with several limits on the requests per device."""
    least = Planner(setting.cost, setting.tiers).resident_tp  # below it there is no room to keep both sets of weights
    small, large = least, setting.tps[-1]
    spread = setting.plan((Shape(small),) * (setting.node // small))
    joined = setting.plan((Shape(large),) * (setting.node // large))
    for up, down in ((2, 1), (4, 2), (8, 4), (16, 8), (32, 16)):
        make = functools.partial(AllOrNothing, spread, joined, SwitchLimits(up=up, down=down))
        yield RunPolicy(f"flying-{up}-{down}", joined, SchedulerConfig(), make, resident_tp=small)


def adaptive(
    setting: Setting,
    name: str = "adaptive",
    *,
    planner: PlannerConfig = PlannerConfig(),
    scheduler: SchedulerConfig = SchedulerConfig(),
    first: tuple[Shape, ...] | None = None,
    allowed: tuple[str, ...] = (),
    device_put: bool = False,
) -> RunPolicy:
    """Adaptive control.

    Args:
      setting: cost, tiers, devices.
      name: what tables call it.
      planner: its settings.
      scheduler: settings of the scheduler.
      first: shapes of a node before anything is known of the load; homogeneous of the TP in the middle if left out.
      allowed: layouts that it may use; empty: all.
      device_put: switches at the cost of resharding everything.
    """
    known = Planner(setting.cost, setting.tiers, planner)
    if first is None:
        tps = [tp for tp in known.tps if tp <= setting.node]
        tp = tps[len(tps) // 2]
        first = (Shape(tp),) * (setting.node // tp)

    def make() -> Controller:
        return AdaptiveController(setting.cost, setting.tiers, planner=planner)

    return RunPolicy(name, setting.plan(first), scheduler, make, known.resident_tp, device_put, allowed)


def ablations(setting: Setting) -> Mapping[str, list[RunPolicy]]:
    """Adaptive control with something taken away; of several policies the best counts.

    | name | what it may not do |
    |---|---|
    | `tp-fixed` | change the TP (any one TP; roles and tiers move) |
    | `split-fixed` | change how many devices prefill and how many decode (any one split; the TP of either moves) |
    | `homogeneous` | have instances of different TPs or roles |
    | `fcfs` | order requests by deadline, or call them late |
    | `device-put` | switch without copying all weights and KV cache of the instances that stop |
    """
    least = Planner(setting.cost, setting.tiers).resident_tp
    tps = [tp for tp in setting.tps if tp >= least]
    same = {tp: (Shape(tp),) * (setting.node // tp) for tp in tps}
    by_split: dict[int, list[tuple[Shape, ...]]] = {}
    of_tp: dict[int, list[str]] = {tp: [setting.layout(shapes)] for tp, shapes in same.items()}
    for shapes in layouts.role_splits(setting.node, tps):
        devices = sum(shape.tp for shape in shapes if shape.role == PREFILL)
        by_split.setdefault(devices, []).append(shapes)
        if len({shape.tp for shape in shapes}) == 1:
            of_tp[shapes[0].tp].append(setting.layout(shapes))
    return {
        "tp-fixed": [adaptive(setting, f"tp-fixed[{tp}]", first=same[tp], allowed=tuple(of_tp[tp])) for tp in tps],
        "split-fixed": [
            adaptive(setting, f"split-fixed[{devices}]", first=splits[0], allowed=tuple(map(setting.layout, splits)))
            for devices, splits in by_split.items()
        ],
        "homogeneous": [
            adaptive(setting, "homogeneous", allowed=tuple(setting.layout(shapes) for shapes in same.values()))
        ],
        "fcfs": [adaptive(setting, "fcfs", scheduler=SchedulerConfig(order="fcfs"))],
        "device-put": [adaptive(setting, "device-put", device_put=True)],
    }


def best_static(setting: Setting) -> Iterator[RunPolicy]:
    """All static layouts, all with our scheduler."""
    yield from static_mixed(setting)
    for shapes in itertools.chain(
        layouts.role_splits(setting.node, setting.tps), joint_plans(setting.node, setting.tps)
    ):
        yield static(setting, "static", shapes)


Family = Callable[[Setting], Iterator[RunPolicy]]


def families(setting: Setting) -> Mapping[str, Family]:
    """All baselines by name."""
    homogeneous: dict[str, Family] = {
        f"static-tp{tp}": functools.partial(static_tp, tp=tp)
        for tp in layouts.homogeneous_tps(setting.node, setting.tps)
    }
    return homogeneous | {
        "static-mixed": static_mixed,
        "distserve": distserve,
        "sarathi": sarathi,
        "apart": apart,
        "dynamo": dynamo,
        "flying": flying,
        "static": best_static,
    }
