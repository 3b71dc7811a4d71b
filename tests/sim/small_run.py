"""Small runs of the cell model with a switch half way; their logs in a folder."""

import dataclasses
import pathlib

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import SwitchingCell
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.sim.runs import metrics
from nitsum_jax.sim.runs.logs import LogFolder, RunLogs, read_folder
from nitsum_jax.sim.workloads.schedules import constant
from nitsum_jax.sim.workloads.synthetic import LognormalLengths, Stream, generate
from nitsum_jax.sim.workloads.workload import Workload
from tests.control.profiles import roofline_profile

DEVICES = 4
TIERS = TierSet((Tier("chat", ttft_ms=300, tpot_ms=12, weight=2), Tier("batch", ttft_ms=5000, tpot_ms=100)))
SPLIT = Layout((InstanceSpec((0, 1), Role.PREFILL), InstanceSpec((2, 3), Role.DECODE)))
MIXED = homogeneous(DEVICES, 2)


def cost_model(kv_tokens: int | None = None) -> CostModel:
    """Step times of a small cell; instances with room for kv_tokens only, if given."""
    profile = roofline_profile((1, 2, 4), devices=DEVICES)
    if kv_tokens is not None:
        small = {tp: dataclasses.replace(t, kv_capacity_tokens=kv_tokens) for tp, t in profile.tps.items()}
        profile = dataclasses.replace(profile, tps=small)
    return CostModel(profile)


def workload(
    rate: float = 12.0, seconds: float = 20.0, seed: int = 0, *, prompt: float = 600, output: float = 60
) -> Workload:
    lengths = LognormalLengths(prompt, 0.8), LognormalLengths(output, 0.8)
    shares = (("chat", 0.75), ("batch", 0.25))
    return generate([Stream(t, constant(rate * s), *lengths) for t, s in shares], seconds, seed, "small")


def run(
    folder: pathlib.Path,
    work: Workload,
    *,
    first: Layout = MIXED,
    then: Layout | None = None,
    cost: CostModel | None = None,
    policy: str = "half-way",
    rate_scale: float = 1.0,
) -> RunLogs:
    """Simulates into the folder; half way the plan becomes `then` (four TP=1 unless given)."""
    plan = homogeneous(DEVICES, 1) if then is None else then
    cost = cost_model() if cost is None else cost
    with LogFolder(folder) as log:
        cell = SwitchingCell(cost, Scheduler(cost, tuple(TIERS)), first, recorder=log)
        cell.on_switch = log.switched
        for i, r in enumerate(work.requests):
            job = ModelJob(str(i), TIERS.get(r.tier), r.arrival_s, r.prompt_tokens, r.output_tokens)
            cell.at(r.arrival_s, cell.add, job)

        def switch() -> None:
            cell.switch(plan)

        cell.at(work.seconds / 2, switch)
        cell.run_until(float("inf"))
    log.summarise({})
    logs = read_folder(folder)
    found = metrics.measure(
        logs.requests, TIERS, work.seconds, devices=DEVICES, steps=logs.steps, switches=logs.switches
    )
    about = {
        "policy": policy,
        "workload": work.name,
        "profile": cost.profile.name,
        "devices": DEVICES,
        "layout": first.placed,
        "rate_scale": rate_scale,
        "preemptions": cell.preemptions,
    }
    log.summarise(metrics.summary(found, TIERS, **about))
    return read_folder(folder)
