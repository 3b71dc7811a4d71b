"""A cell of many nodes: how long a decision takes, and what planning the cell as one is worth.

    python benchmarks/control/fleet.py [--profile=qwen2.5-32b-h200] [--part=planning,quality] [--nodes=8]
        [--phase_seconds=40]

*Planning*: CPU seconds of a decision for 64 to 512 devices, from a plan that does not suit the load and from the one
that was chosen.  *Quality*: a load that shifts between chat and code on a cell of many nodes under one adaptive
controller, beside the same load dealt in turn to as many cells of one node, each with its own adaptive controller (the
planner of one node, replays and all).  Everything runs on one core and prints Markdown tables.
"""

import sys
import time
from collections.abc import Sequence

from absl import app, flags

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous, shapes_text
from nitsum_jax.control.planning.decision import PlanInputs
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.study.loads import Load, LoadPhase, Part
from nitsum_jax.sim.study.sources import open_traces
from nitsum_jax.sim.workloads.workload import Workload

_TRACES = flags.DEFINE_string("traces", None, "Folder of the Azure traces of 2023; stand-ins if left out.")
_PROFILE = flags.DEFINE_string("profile", "qwen2.5-32b-h200", "Name of a profile.")
_PARTS = flags.DEFINE_list("part", ["planning", "quality"], "What to run.")
_NODES = flags.DEFINE_integer("nodes", 8, "Nodes of the cell of the quality part.", lower_bound=2)
_PHASE_SECONDS = flags.DEFINE_float("phase_seconds", 40.0, "Length of a phase of the quality part.")
_RATE = flags.DEFINE_list("rate", ["24", "32", "40"], "Requests a second for each node, of the quality part.")

TIGHT, RELAXED = Tier("chat", ttft_ms=500, tpot_ms=12), Tier("code", ttft_ms=10_000, tpot_ms=200)
BATCH = Tier("batch", ttft_ms=60_000, tpot_ms=500)
_PROMPTS = (120, 300, 520, 820, 1100, 1500, 2300, 4000)
_CODE_PROMPTS = (300, 700, 1100, 1600, 2100, 2800, 3900, 6500)


def _loads(nodes: int, shares: dict[str, float]) -> tuple[TierLoad, ...]:
    """A load with so many requests a second for each node."""
    lengths = {"chat": (_PROMPTS, 210.0), "code": (_CODE_PROMPTS, 28.0), "batch": (_CODE_PROMPTS, 300.0)}
    return tuple(TierLoad(name, rate * nodes, 1.5, *lengths[name]) for name, rate in shares.items())


def planning(cost: CostModel) -> None:
    """Prints what decisions take."""
    loads = {
        "two tiers, chat-heavy": {"chat": 20.0, "code": 10.0},
        "two tiers, code-heavy": {"chat": 4.0, "code": 20.0},
        "three tiers": {"chat": 8.0, "code": 8.0, "batch": 3.0},
    }
    _line("| devices | load | first decision, s | next one, s | predicted before | after | chosen |")
    _line("|---|---|---|---|---|---|---|")
    for devices in (64, 128, 256, 512):
        for name, shares in loads.items():
            planner = Planner(cost, (TIGHT, RELAXED, BATCH))
            plan: Layout = homogeneous(devices, 2)
            took = []
            decisions = []
            for _ in range(2):
                inputs = PlanInputs(0.0, plan, devices, (), _loads(devices // 8, shares))
                start = time.process_time()
                decision = planner.decide(inputs)
                took.append(time.process_time() - start)
                decisions.append(decision)
                plan = decision.choice
            shapes = sorted(plan.shapes, key=lambda shape: (-shape.tp, str(shape)))
            before = decisions[0].candidates[0].score
            after = decisions[1].candidates[0].score
            _line(
                f"| {devices} | {name} | {took[0]:.2f} | {took[1]:.2f} | {before:.1%} | {after:.1%} |"
                f" `{shapes_text(shapes)}` |"
            )


def quality(cost: CostModel) -> None:
    """Prints one controller for the cell beside one for each node."""
    traces, source = open_traces(_TRACES.value, 0)
    nodes, node = _NODES.value, cost.profile.devices
    tiers = TierSet((TIGHT, RELAXED))
    _line(f"\n{nodes} nodes of {node} devices, {source}; attainment.\n")
    _line(
        "| requests/s | one cell, adaptive | switches | CPU, s | each node by itself, adaptive | CPU, s | static TP |"
    )
    _line("|---|---|---|---|---|---|---|")
    phases = [("chat", 0.9), ("code", 0.15), ("both", 0.5)]
    for rate in map(float, _RATE.value):
        parts = [
            LoadPhase(
                _PHASE_SECONDS.value, (Part("conv", "chat", rate * chat), Part("code", "code", rate * (1 - chat)))
            )
            for _, chat in phases
        ]
        workload = Load("shifting", dict(traces), tuple(parts)).at(nodes)
        large, small = Setting(cost, tiers, nodes * node), Setting(cost, tiers, node)
        whole, switches, took = _run(workload, large, baselines.adaptive(large))
        met = count = 0.0
        apart_took = 0.0
        for i in range(nodes):
            dealt = Workload(workload.requests[i::nodes], workload.name, workload.seconds)
            share, _, seconds = _run(dealt, small, baselines.adaptive(small))
            met += share * len(dealt.requests)
            count += len(dealt.requests)
            apart_took += seconds
        static = {tp: _run(workload, large, next(baselines.static_tp(large, tp)))[0] for tp in large.tps if tp >= 2}
        best = max(static, key=lambda tp: static[tp])
        _line(
            f"| {workload.rate:.0f} | {whole:.1%} | {switches} | {took:.0f} | {met / count:.1%} | {apart_took:.0f} |"
            f" {static[best]:.1%} (TP {best}) |"
        )


def _run(workload: Workload, setting: Setting, policy: RunPolicy) -> tuple[float, int, float]:
    start = time.process_time()
    outcome = simulate(workload, setting.tiers, setting.cost, policy, num_devices=setting.num_devices)
    return outcome.attainment, len(outcome.switches), time.process_time() - start


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str]) -> None:
    """Runs the parts."""
    del argv
    cost = CostModel(load_profile(_PROFILE.value))
    if "planning" in _PARTS.value:
        planning(cost)
    if "quality" in _PARTS.value:
        quality(cost)


if __name__ == "__main__":
    app.run(main)
