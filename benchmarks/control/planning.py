"""What planning costs: processor time of decisions beside the time of the cell that they are made for.

    python benchmarks/control/planning.py [--traces=FOLDER] [--factor=0.5 --factor=1] [--only=qwen] [--work_rate=1e9]

Adaptive control serves the shifting mix of the quick study, at its rates and at other multiples of them, in the
simulator; decisions are those of a live controller.  A share of a core is seconds of decisions over seconds of the
cell.  Prints a Markdown table.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

from absl import app, flags

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.planning.controller import AdaptiveController, ControllerConfig
from nitsum_jax.control.planning.decision import Decision, PlanInputs
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.simulation import simulate
from nitsum_jax.sim.study.config import phases_of, read_study
from nitsum_jax.sim.study.loads import Load
from nitsum_jax.sim.study.sources import open_traces
from nitsum_jax.sim.workloads.workload import Workload

_TRACES = flags.DEFINE_string("traces", None, "Folder of the Azure traces of 2023; stand-ins if left out.")
_FACTORS = flags.DEFINE_multi_float("factor", [0.5, 1.0, 1.3], "Multiple of the study's rates; may be repeated.", 1e-3)
_ONLY = flags.DEFINE_string("only", "", "Profiles whose name contains this.")
_WORK_RATE = flags.DEFINE_float(
    "work_rate",
    ControllerConfig().work_rate,
    "See `ControllerConfig`; 1e9: planning may cost all it likes.",
    0.0,
)


class _Timed:
    """A planner that keeps how long each decision took."""

    def __init__(self, planner: Planner):
        self.seconds: list[float] = []
        self._planner = planner

    def decide(self, inputs: PlanInputs) -> Decision:
        """As the planner says."""
        start = time.process_time()
        decision = self._planner.decide(inputs)
        self.seconds.append(time.process_time() - start)
        return decision


def row(profile: str, setting: Setting, workload: Workload) -> str:
    """One run, as a line of the table."""
    timed = _Timed(Planner(setting.cost, setting.tiers))
    config = ControllerConfig(work_rate=_WORK_RATE.value)
    policy = dataclasses.replace(
        baselines.adaptive(setting),
        controller=lambda: AdaptiveController(setting.cost, setting.tiers, config=config, decide=timed.decide),
    )
    outcome = simulate(workload, setting.tiers, setting.cost, policy, num_devices=setting.num_devices)
    took = timed.seconds or [0.0]
    return (
        f"| {profile} | {workload.rate:.1f} | {outcome.attainment:.1%} | {len(timed.seconds)} |"
        f" {1000 * sum(took) / len(took):.0f} | {1000 * max(took):.0f} | {sum(took) / workload.seconds:.1%} |\n"
    )


def main(argv: Sequence[str]) -> None:
    """Runs and prints."""
    del argv
    config = read_study("quick")
    try:
        traces, source = open_traces(_TRACES.value, config.seed)
    except InvalidInputError as error:
        sys.exit(str(error))
    mix = next(mix for mix in config.mixes if mix.name == "shifting")
    sys.stdout.write(f"shifting mix, {source}\n\n")
    sys.stdout.write("| profile | requests/s | attainment | decisions | ms each | longest, ms | share of a core |\n")
    sys.stdout.write("|---|---|---|---|---|---|---|\n")
    for case in config.cases:
        load = Load(mix.name, traces, phases_of(mix, case), config.seed)
        for profile in case.profiles:
            if _ONLY.value not in profile:
                continue
            setting = Setting(CostModel(load_profile(profile)), case.tiers, config.devices)
            for factor in _FACTORS.value:
                sys.stdout.write(row(profile, setting, load.at(factor)))
                sys.stdout.flush()


if __name__ == "__main__":
    app.run(main)
