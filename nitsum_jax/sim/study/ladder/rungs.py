"""The rungs: policies by family, each with the settings that its best is searched over.

What is deployed knows no targets (but for Chiron style, which sizes batches by the time per token) and serves first
come first served.  Ours has the scheduler of `control/scheduling` from the first rung on.

| rung | what it is |
|---|---|
| `vanilla` | replicas of one TP, a queue each, requests dealt in turn; chunk and batch limit tuned |
| `vanilla-timeouts` | the same; who has waited for its whole TTFT target goes |
| `least-loaded` | replicas of one TP, one queue, the least loaded takes the next (after Llumnix) |
| `split` | prefill instances of one TP, decode instances of one TP |
| `chiron` | replicas of one TP, some kept for tight or relaxed tiers, batches as large as the time per token allows |
| `apart` | tiers in instances of their own |
| `dynamo` | prefill and decode apart, devices change their role by load |
| `flying` | all instances of the least TP, or of the largest, by load |
| `ours-static-tp` | our scheduler, instances of one TP |
| `ours-apart` | our scheduler, tiers in instances of their own |
| `ours-static-mixed` | our scheduler, any instances with any placement of tiers |
| `ours-adaptive` | our scheduler, the layout changes by itself |
| `ours-device-put` | the same, but every switch copies all weights and KV cache of the instances that stop |
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

from nitsum_jax.control.plan import Shape, kinds
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.queueing import QueueingModel
from nitsum_jax.control.scheduling.scheduler import SchedulerConfig
from nitsum_jax.sim.policies import baselines, layouts
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import RunPolicy

DEPLOYED = ("vanilla", "vanilla-timeouts", "least-loaded", "split", "chiron", "apart", "dynamo", "flying")
"""What can be had today."""
STATIC = ("ours-static-tp", "ours-apart", "ours-static-mixed")
"""Our scheduler with a layout that never changes."""
_CHUNKS = (512, 2048, 8192)
_BATCHES = (32, 256)
_MIXED = 24  # static layouts that are searched, the best by the planner's estimate


@dataclasses.dataclass(frozen=True, slots=True)
class Entrant:
    """A policy with what a run of it needs besides.

    Attributes:
      policy: decides.
      max_batch: most requests of an instance.
      dealt: requests are dealt to the instances in turn, each of which has a queue of its own.
    """

    policy: RunPolicy
    max_batch: int = 256
    dealt: bool = False

    @property
    def name(self) -> str:
        """That of the policy, with the batch limit if it is no default."""
        return self.policy.name if self.max_batch == 256 else f"{self.policy.name} batch {self.max_batch}"


def rungs(setting: Setting, loads: Iterable[TierLoad]) -> Mapping[str, Callable[[], Iterator[Entrant]]]:
    """All rungs in order; `loads` is what the whole workload is like, by which static layouts are preselected."""
    loads = tuple(loads)
    return {
        "vanilla": lambda: _vanilla(setting, timeouts=False),
        "vanilla-timeouts": lambda: _vanilla(setting, timeouts=True),
        "least-loaded": lambda: _least_loaded(setting),
        "split": lambda: _plain(_first_of(baselines.distserve(setting), "distserve-fcfs")),
        "chiron": lambda: _chiron(setting),
        "apart": lambda: _apart(setting),
        "dynamo": lambda: _plain(_as_deployed(baselines.dynamo(setting))),
        "flying": lambda: _plain(_as_deployed(baselines.flying(setting))),
        "ours-static-tp": lambda: _static_tp(setting),
        "ours-apart": lambda: _plain(baselines.apart(setting)),
        "ours-static-mixed": lambda: _mixed(setting, loads),
        "ours-adaptive": lambda: _plain([baselines.adaptive(setting)]),
        "ours-device-put": lambda: _plain([baselines.adaptive(setting, "device-put", device_put=True)]),
    }


def _plain(policies: Iterable[RunPolicy]) -> Iterator[Entrant]:
    for policy in policies:
        yield Entrant(policy)


def _first_of(policies: Iterable[RunPolicy], name: str) -> Iterator[RunPolicy]:
    return (policy for policy in policies if policy.name.startswith(f"{name}["))


def _as_deployed(policies: Iterable[RunPolicy]) -> Iterator[RunPolicy]:
    return (dataclasses.replace(policy, scheduler=_fcfs(2048)) for policy in policies)


def _fcfs(chunk: int, routing: str = "least_loaded", *, apart: bool = False) -> SchedulerConfig:
    return SchedulerConfig(
        order="fcfs", routing=routing, chunk_tokens=chunk, ahead_tokens=max(512, chunk), tiers_apart=apart
    )


def _same(setting: Setting) -> Iterator[tuple[Shape, ...]]:
    for tp in setting.tps:
        yield (Shape(tp),) * (setting.node // tp)


def _vanilla(setting: Setting, *, timeouts: bool) -> Iterator[Entrant]:
    for shapes in _same(setting):
        for chunk in _CHUNKS:
            policy = baselines.static(setting, f"chunk {chunk} ", shapes, _fcfs(chunk))
            for batch in _BATCHES:
                yield Entrant(dataclasses.replace(policy, timeouts=timeouts), batch, dealt=True)


def _least_loaded(setting: Setting) -> Iterator[Entrant]:
    for shapes in _same(setting):
        for chunk in _CHUNKS:
            yield Entrant(baselines.static(setting, f"chunk {chunk} ", shapes, _fcfs(chunk)))


def _chiron(setting: Setting) -> Iterator[Entrant]:
    for cut in layouts.cuts(setting.node, setting.tps):
        if len(set(cut)) == 1:
            for shapes in layouts.placements(cut, setting.tiers):
                yield Entrant(baselines.static(setting, "chiron", shapes, _fcfs(2048, "predicted")))


def _apart(setting: Setting) -> Iterator[Entrant]:
    for shapes in layouts.tier_splits(setting.node, setting.tps, setting.tiers):
        yield Entrant(baselines.static(setting, "apart-fcfs", shapes, _fcfs(2048, apart=True)))


def _static_tp(setting: Setting) -> Iterator[Entrant]:
    for tp in setting.tps:
        yield from _plain(baselines.static_tp(setting, tp))


def _mixed(setting: Setting, loads: tuple[TierLoad, ...]) -> Iterator[Entrant]:
    """The best static layouts by the planner's estimate: half of them at this load, half at twice the load."""
    model = QueueingModel(setting.cost, {tier.name: tier for tier in setting.tiers}, loads)
    policies = list(baselines.best_static(setting))
    chosen: dict[str, RunPolicy] = {}
    for scale in (1.0, 2.0):
        order = sorted(policies, key=lambda policy: -model.predict(policy.plan.shapes, scale).goodput)
        seen: set[tuple[tuple[int, str], ...]] = set()
        for policy in order:  # one of every layout: of placements the estimate tells only some apart
            kind = kinds(policy.plan.shapes)
            if kind not in seen and len(seen) < _MIXED // 2:
                seen.add(kind)
                chosen.setdefault(policy.name, policy)
    yield from _plain(chosen.values())
