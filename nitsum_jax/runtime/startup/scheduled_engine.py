"""An engine that schedules by tiers: the settings, the cost model and the policy that belong together."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.planning.decision import PlannerConfig
from nitsum_jax.control.planning.planner import least_tp
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.batching.pacing import Pace
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.executables.progress import CompileProgress
from nitsum_jax.engine.request import TokenDelta
from nitsum_jax.meshes.devices import discover
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.loading import OpenModel
from nitsum_jax.runtime.scheduling import costs
from nitsum_jax.runtime.scheduling.reach import Reach, Tap, predicted_reach, stretched
from nitsum_jax.runtime.scheduling.tiered import TieredScheduling
from nitsum_jax.runtime.scheduling.tiered_engine import check_tiers, tiered


@dataclasses.dataclass(frozen=True, slots=True)
class Scheduled:
    """A started engine.

    Attributes:
      engine: its layouts may say which tiers they keep instances for.
      scheduling: its policy.
      cost: what the policy predicts with.
      pace: at whose pace it runs; None: at its own.
      tiers: with their targets in force.
      reach: what a request alone gets; None if it was not asked for.
    """

    engine: Engine
    scheduling: TieredScheduling
    cost: CostModel
    pace: Pace | None
    tiers: TierSet
    reach: Reach | None = None

    def planned_tps(self) -> tuple[int, ...]:
        """TPs that a planner may use: of those that it would use by itself, the ones that the cell can have."""
        vmap = self.engine.cell.vmap
        here = tuple(tp for tp in self.cost.tps if vmap.min_tp <= tp <= vmap.num_vshards)
        least = least_tp(self.cost, PlannerConfig())
        return tuple(tp for tp in here if tp >= least) or here


def start_scheduled(
    model: OpenModel,
    config: EngineConfig,
    tiers: TierSet,
    sink: Callable[[Sequence[TokenDelta]], None],
    *,
    admitted: Callable[[str, float], None] | None = None,
    profile: str | None = None,
    pace: str | None = None,
    time_scale: float = 1.0,
    find_reach: bool = False,
    stretch: bool = False,
    on_progress: Callable[[CompileProgress], None] | None = None,
) -> Scheduled:
    """Starts an engine; takes as long as loading and compiling take.

    Args:
      model: to be served.
      config: of the engine.
      tiers: that requests may name.
      sink: takes the deltas of every step.
      admitted: called with every request that leaves the queue, and when.
      profile: what the scheduling predicts with at first, a name or a file; None: the model's size will do.
      pace: profile at whose pace the cell runs.
      time_scale: of a paced cell, seconds here for a second of its target.
      find_reach: find out what a request alone gets: a paced cell's profile knows, any other serves one or two.
      stretch: make targets longer that the cell cannot keep.
      on_progress: called with the progress of compiling, until the first layout can serve.

    Raises:
      NitsumError: model, devices, layout, profile or memory do not fit.
    """
    if pace is not None:
        config, cost = costs.paced(config, model.config, pace, time_scale)
    else:
        devices = discover(config.devices)
        cut = ModelCut.of(model.config, config.num_vshards(len(devices)))
        formats = model.formats(config.quantization, cut)
        cost = costs.predicted(config, model.config, profile, devices, formats)
        config = dataclasses.replace(config, tps=cost.tps if profile is not None else None)
    scale = time_scale if pace is not None else 1.0
    tap = Tap(sink, admitted)
    scheduling = TieredScheduling(tiers, cost, config.max_queue, admitted=tap.admitted, time_scale=scale)
    config, first = _without_tiers(config, tiers.names)
    scheduling.keep_for(first)
    engine = start_engine(model, config, tap, scheduling, on_progress)
    reach = None
    if find_reach or stretch:
        if pace is not None:
            reach = predicted_reach(cost, {instance.tp for instance in engine.layout().instances})
        else:
            reach = tap.measure(engine, model.config.vocab_size, tiers.names[0], time.monotonic)
        if reach is not None and stretch:
            tiers = stretched(tiers, reach)
        scheduling.begin(tiers)
    return Scheduled(tiered(engine, scheduling, first), scheduling, cost, config.pace, tiers, reach)


def _without_tiers(config: EngineConfig, known: Sequence[str]) -> tuple[EngineConfig, Layout]:
    """The layouts of a configuration as the engine reads them, and what the first one keeps for which tiers.

    Tiers in an allow-list restrict nothing; those of its first layout count where a cell begins with that.
    """
    devices = len(discover(config.devices))
    listed = None if config.layouts is None else [parse_layout(text, devices) for text in config.layouts]
    first = None if config.layout is None else parse_layout(config.layout, devices)
    for layout in (*(listed or ()), *([first] if first else ())):
        check_tiers(layout, known)
    bare = dataclasses.replace(
        config,
        layout=None if first is None else str(first.without_tiers()),
        layouts=None if listed is None else tuple(str(layout.without_tiers()) for layout in listed),
    )
    start = first or (listed[0] if listed else Layout(()))
    return bare, start
