"""How long the simulator takes, and how that grows with devices and requests.

    python benchmarks/control/simulator.py [--traces=FOLDER] [--profile=qwen2.5-32b-h200] [--seconds=3500]
        [--large_seconds=120]

Seconds are those of the process on one core, without reading the traces.  The rate grows with the devices, so that each
has the same to do.  Prints a Markdown table.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.study.loads import Load, LoadPhase, Part
from nitsum_jax.sim.study.sources import open_traces
from nitsum_jax.sim.workloads.workload import Workload

_TRACES = flags.DEFINE_string("traces", None, "Folder of the Azure traces of 2023; stand-ins if left out.")
_PROFILE = flags.DEFINE_string("profile", "qwen2.5-32b-h200", "Name of a profile.")
_SECONDS = flags.DEFINE_float("seconds", 3500.0, "Length of the runs with 8 devices at the traces' rate.")
_LARGE_SECONDS = flags.DEFINE_float("large_seconds", 120.0, "Length of the runs with more devices or requests.")

TIERS = TierSet((Tier("chat", ttft_ms=500, tpot_ms=15), Tier("code", ttft_ms=10_000, tpot_ms=200)))
_CHAT, _CODE = 5.53, 2.57  # requests a second in the traces


@dataclasses.dataclass(frozen=True)
class Row:
    """One run."""

    devices: int
    policy: RunPolicy
    workload: Workload


def rows(traces: dict[str, Workload]) -> list[Row]:
    """The runs, small ones first."""
    cost = CostModel(load_profile(_PROFILE.value))

    def load(seconds: float, factor: float) -> Workload:
        parts = (Part("conv", "chat", _CHAT), Part("code", "code", _CODE))
        return Load("both", traces, (LoadPhase(seconds, parts),)).at(factor)

    def static(setting: Setting) -> RunPolicy:
        return next(baselines.static_tp(setting, 4))

    small = Setting(cost, TIERS, 8)
    hour, short = load(_SECONDS.value, 1.0), _LARGE_SECONDS.value
    found = [
        Row(8, static(small), hour),
        Row(8, baselines.adaptive(small), hour),
        Row(8, baselines.adaptive(small), load(short, 3.0)),
        Row(8, static(small), load(short, 10.0)),
        Row(8, baselines.adaptive(small), load(short, 10.0)),
    ]
    for devices in (64, 512):
        large = Setting(cost, TIERS, devices)
        found += [
            Row(devices, static(large), load(short, devices / 8)),
            Row(devices, static(large), load(short, 3.0 * devices / 8)),
            Row(devices, baselines.adaptive(large), load(short, devices / 8)),
            Row(devices, baselines.adaptive(large), load(short, 3.0 * devices / 8)),
        ]
    return found


def main(argv: Sequence[str]) -> None:
    """Runs and prints."""
    del argv
    traces, source = open_traces(_TRACES.value, 0)
    cost = CostModel(load_profile(_PROFILE.value))
    sys.stdout.write(f"{_PROFILE.value}, {source}\n\n")
    sys.stdout.write("| devices | policy | requests | a second | attainment | CPU, s | ms a request | switches |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|---|\n")
    for row in rows(dict(traces)):
        start = time.process_time()
        outcome = simulate(row.workload, TIERS, cost, row.policy, num_devices=row.devices)
        seconds = time.process_time() - start
        count = len(row.workload.requests)
        sys.stdout.write(
            f"| {row.devices} | {row.policy.name.partition('[')[0]} | {count} | {row.workload.rate:.1f} |"
            f" {outcome.attainment:.1%} | {seconds:.1f} | {1000 * seconds / count:.2f} | {len(outcome.switches)} |\n"
        )
        sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
