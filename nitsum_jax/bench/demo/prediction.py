"""What the simulator says of the demonstration: the same load, profile and layouts."""

import dataclasses

from nitsum_jax.meshes.layout import parse_shapes
from nitsum_jax.sim.policies.baselines import Setting, adaptive, best_static, static
from nitsum_jax.sim.runs.logs import request_record
from nitsum_jax.sim.runs.metrics import Metrics, measure
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.runs.tables import RequestTable
from nitsum_jax.sim.workloads.workload import Workload


def predict(setting: Setting, workload: Workload, policy: RunPolicy, max_batch: int) -> Metrics:
    """The figures of a simulated run."""
    outcome = simulate(
        workload, setting.tiers, setting.cost, policy, num_devices=setting.num_devices, max_batch=max_batch
    )
    records = [request_record(job) for job in outcome.finished]
    records += [dataclasses.replace(request_record(job), finish_s=None, met=False) for job in outcome.failed]
    return measure(RequestTable.of(records), setting.tiers, workload.seconds)


def static_policy(setting: Setting, layout: str) -> RunPolicy:
    """A layout as a policy."""
    return static(setting, layout, parse_shapes(layout))


def adaptive_policy(setting: Setting, first: str) -> RunPolicy:
    """Adaptive control that begins with a layout."""
    return adaptive(setting, first=parse_shapes(first))


def best_uneven(setting: Setting, workload: Workload, max_batch: int) -> str | None:
    """Of the layouts with several TPs or roles, the one that is best in hindsight, by the simulator.

    Those that keep instances for some tiers are left out: a static server has no such setting.
    """
    best: tuple[float, str] | None = None
    for policy in best_static(setting):
        instances = policy.plan.instances
        if any(i.tiers for i in instances) or len({(i.tp, i.role) for i in instances}) == 1:
            continue
        found = predict(setting, workload, policy, max_batch).total.goodput
        if best is None or found > best[0]:
            best = found, str(policy.plan)
    return None if best is None else best[1]
