"""Whether it pays to keep cells of a cluster for tiers: as the fleet planner says, and as hindsight does.

    python benchmarks/control/dedicated_cells.py [--mixes=60:60,85:20,20:110] [--seeds=0,1,2] [--seconds=20]

Eight cells of two H100s, Llama 3.1 8B at TP 1, behind one door with the router of the cluster; stand-ins for Azure's
traces, chat and code, with the rate of each scaled by so much.  The planner is told of the whole workload, which a
live one is not.  In hindsight, every number of cells for chat is tried, and code has the rest.
"""

import argparse
from collections.abc import Iterator

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.routing.routers import PredictedRouter
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.cluster.plans import CellPlans, ask_planner, dedicated, planned, shared
from nitsum_jax.sim.cluster.run import ClusterSetting, simulate_cluster
from nitsum_jax.sim.workloads.stand_ins import open_trace
from nitsum_jax.sim.workloads.traces import parse_trace_flag
from nitsum_jax.sim.workloads.workload import Workload, mix, scale_rate, window

CELLS, DEVICES = 8, 2
TIERS = TierSet((Tier("chat", 300, 18), Tier("code", 3000, 100)))
TRACES = ("chat:azure-conv-like", "code:azure-code-like")
LAYOUT = homogeneous(DEVICES, 1)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixes", default="60:60,85:20,20:110", help="factors on the rates of chat and code")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    cost = CostModel(load_profile("llama-3.1-8b-h100"))
    print("| chat, code, times the trace; seed | shared | the planner's | | best division in hindsight | |")
    print("|---|---|---|---|---|---|")
    for scales in given.mixes.split(","):
        for seed in map(int, given.seeds.split(",")):
            workload = load_of(tuple(map(float, scales.split(":"))), seed, given.seconds)
            print("| " + " | ".join([f"{scales}; {seed}", *row(workload, cost, seed)]) + " |", flush=True)


def load_of(scales: tuple[float, ...], seed: int, seconds: float) -> Workload:
    """Both traces, the rate of each scaled."""
    parts = [open_trace(parse_trace_flag(text), seed=seed, seconds=seconds).workload for text in TRACES]
    scaled = [scale_rate(part, scale, seed) for part, scale in zip(parts, scales, strict=True)]
    return window(mix(scaled), 0.0, seconds)


def row(workload: Workload, cost: CostModel, seed: int) -> Iterator[str]:
    """Attainment of every cell for every tier, of the planner's choice, and of the best division of all."""

    def attained(cells: CellPlans) -> float:
        setting = ClusterSetting(cells, seed=seed)
        return simulate_cluster(workload, TIERS, cost, setting, PredictedRouter(seed)).attainment

    yield f"{attained(shared(CELLS, LAYOUT)):.1%}"
    decision = ask_planner(workload, TIERS, cost, CELLS, LAYOUT, DEVICES)
    chosen = planned(CELLS, LAYOUT, DEVICES, decision)
    yield f"{attained(chosen):.1%}"
    yield f"{chosen} ({decision.choice.unplaced})"
    divisions = {chat: dedicated(CELLS, LAYOUT, {"chat": (chat, LAYOUT)}, TIERS) for chat in range(1, CELLS)}
    found = {chat: attained(division) for chat, division in divisions.items()}
    best = max(found, key=lambda chat: found[chat])
    yield f"{found[best]:.1%}"
    yield f"{best} for chat, {CELLS - best} for code"


if __name__ == "__main__":
    main()
