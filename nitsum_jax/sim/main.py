"""`nitsum-simulate`: runs workloads through the model of a cell, and writes what came of it."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import sys
from collections.abc import Sequence

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.routing.routers import ROUTERS
from nitsum_jax.control.tiers import Tier, TierSet, read_tiers
from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.meshes.layout import Layout, parse_layout
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim import options
from nitsum_jax.sim.cluster.plans import CellPlans, ask_planner, dedicated, planned, shared
from nitsum_jax.sim.cluster.run import ClusterSetting, router_table
from nitsum_jax.sim.options import SimulateOptions, UsageRequested
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.policies.bound import candidates, upper_bound
from nitsum_jax.sim.policies.named import policies_named
from nitsum_jax.sim.policies.search import RateGrid, capacity, run, sample, tournament
from nitsum_jax.sim.report.page import write_report
from nitsum_jax.sim.runs.audit_tool import run_audit
from nitsum_jax.sim.runs.logs import LogFolder, request_record, switch_record
from nitsum_jax.sim.runs.metrics import Metrics, measure, summary, table, to_json
from nitsum_jax.sim.runs.records import STEPS, SUMMARY, read_steps
from nitsum_jax.sim.runs.replay import replay
from nitsum_jax.sim.runs.simulation import RunOutcome, RunPolicy, simulate
from nitsum_jax.sim.runs.summary import Figures, figures_of
from nitsum_jax.sim.runs.tables import RequestTable, StepTable
from nitsum_jax.sim.workloads.workload import Workload, scale_rate
from nitsum_jax.sim.workloads.workload_flags import workload_of

BOUND = "+bound"
DEFAULT_TIERS = TierSet((Tier("chat", ttft_ms=500, tpot_ms=50), Tier("code", ttft_ms=10_000, tpot_ms=200)))
"""Targets of the stand-in traces' tiers."""
_GRID = RateGrid(1.05)
_LOWEST = -60
_SAMPLE_S = 80.0
_FINALISTS = 3


def main(argv: Sequence[str]) -> int:
    """Runs the tool; returns the exit status."""
    try:
        given = options.parse(argv)
        if given.audit is not None:
            return run_audit(given.audit, given.profile, given.tiers, _out)
        setting = _setting(given)
        if given.replay is not None:
            return _replay(given, setting)
        if given.cells > 1:
            return _cluster(given, setting)
        return _Tool(given, setting).run()
    except UsageRequested as e:
        _out(str(e))
        return 0
    except NitsumError as e:
        sys.stderr.write(f"nitsum-simulate: {e}\n")
        return 2 if isinstance(e, InvalidInputError) else 1
    except KeyboardInterrupt:
        return 130


def run_tool() -> None:
    """Entry point."""
    sys.exit(main(sys.argv))


def _setting(given: SimulateOptions) -> Setting:
    assert given.profile is not None
    tiers = read_tiers(given.tiers) if given.tiers else DEFAULT_TIERS
    return Setting(CostModel(load_profile(given.profile)), tiers, given.devices)


def _workload(given: SimulateOptions, tiers: TierSet) -> Workload:
    where = f"--tiers={given.tiers}" if given.tiers else "the tiers used without --tiers"
    return workload_of(
        given.trace, tiers, where, seconds=given.seconds, rate_scale=given.rate_scale, seed=given.seed, note=_note
    )


def _replay(given: SimulateOptions, setting: Setting) -> int:
    assert given.replay is not None
    found = replay(given.replay, setting)
    for line in found.differences:
        _out(line)
    same = found.decisions - len(found.differences)
    _out(f"{found.decisions} decisions made again: {same} the same, {len(found.differences)} different")
    return 1 if found.differences else 0


def _cluster(given: SimulateOptions, setting: Setting) -> int:
    if given.policies == ("adaptive",):
        plan = homogeneous(given.devices, setting.tps[0])
    else:
        (policy,) = policies_named(setting, given.policies[0])
        plan = policy.plan
    workload = _workload(given, setting.tiers)
    if given.planned:
        decision = ask_planner(workload, setting.tiers, setting.cost, given.cells, plan, given.devices)
        cells = planned(given.cells, plan, given.devices, decision)
        _out(f"{cells} ({decision.reason})")
    else:
        cells = _dedicated(given, setting.tiers, plan)
    cluster = ClusterSetting(cells, given.report_s, given.doors, given.continued, given.seed)
    made = {name: ROUTERS[name](given.seed) for name in given.routers}
    for line in router_table(workload, setting.tiers, setting.cost, cluster, made):
        _out(line)
    return 0


def _dedicated(given: SimulateOptions, tiers: TierSet, plan: Layout) -> CellPlans:
    own = {}
    for tier, count, text in given.dedicate:
        tiers.get(tier)  # or say which there are
        own[tier] = (count, plan if text is None else parse_layout(text, given.devices))
    left = [name for name in tiers.names if name not in own]
    if left and sum(count for count, _ in own.values()) == given.cells:
        raise InvalidInputError(f"--dedicate leaves no cell for tier {left[0]}: name it, too, or give more --cells")
    return dedicated(given.cells, plan, own, tiers) if own else shared(given.cells, plan)


class _Tool:
    """One call of the tool."""

    def __init__(self, given: SimulateOptions, setting: Setting):
        self.given = given
        self.setting = setting
        self.workload = _workload(given, setting.tiers)
        self.out = pathlib.Path(given.out) if given.out else None
        self.used: list[Layout] = []  # plans of the runs so far
        self.scaled = functools.lru_cache(maxsize=4)(
            lambda level: scale_rate(self.workload, _GRID.factor(level), given.seed) if level else self.workload
        )

    def run(self) -> int:
        given = self.given
        names = [name for name in given.policies if name != BOUND]
        chosen = [self._choose(name) for name in names]
        rows: dict[str, Metrics] = {}
        folders: list[pathlib.Path] = []
        for name, policy in zip(names, chosen, strict=True):
            folder = None if self.out is None else self.out if len(names) == 1 else self.out / _file_name(name)
            rows[policy.name] = self._run(policy, folder)
            if folder is not None:
                folders.append(folder)
        if rows:
            _out(table(rows))
        if BOUND in given.policies:
            self._bound()
        if given.capacity:
            for name, policy in zip(names, chosen, strict=True):
                folders += self._capacity(name, policy)
        if self.out is not None and folders:
            report = self.out / "report.html"
            write_report(folders, report, title=f"{self.workload.name} on {given.profile}")
            _note(f"logs and report: {report}")
        return 0

    def _choose(self, name: str) -> RunPolicy:
        found = policies_named(self.setting, name, device_put=self.given.switch == "device_put")
        if len(found) == 1:
            return found[0]
        look = functools.cache(lambda level: sample(self.scaled(level), _SAMPLE_S))
        top = tournament(found, 0, lambda policy, level: self._figures(look(level), policy, 0.3), _FINALISTS)
        best = max(top, key=lambda policy: self._figures(self.workload, policy, None).attainment)
        _note(f"{name}: best of {len(found)} is {best.name}")
        return best

    def _figures(self, workload: Workload, policy: RunPolicy, give_up: float | None) -> Figures:
        return run(self.setting, workload, policy, give_up=give_up, compile_s=self.given.compile_s)

    def _simulate(self, workload: Workload, policy: RunPolicy, log: LogFolder | None, progress: bool) -> RunOutcome:
        return simulate(
            workload,
            self.setting.tiers,
            self.setting.cost,
            policy,
            num_devices=self.given.devices,
            log=log,
            log_steps=self.given.steps,
            max_batch=self.given.max_batch,
            compile_s=self.given.compile_s,
            progress=progress,
        )

    def _run(self, policy: RunPolicy, folder: pathlib.Path | None) -> Metrics:
        bar = self.given.progress and sys.stderr.isatty()
        with contextlib.nullcontext() if folder is None else LogFolder(folder) as log:
            outcome = self._simulate(self.workload, policy, log, bar)
        self.used += [policy.plan, *(report.after for report in outcome.switches)]
        if log is None:
            return self._measure(outcome, None)
        metrics = self._measure(outcome, folder if self.given.steps else None)
        log.summarise(self._summary(policy, outcome, metrics))
        return metrics

    def _measure(self, outcome: RunOutcome, folder: pathlib.Path | None) -> Metrics:
        failed = (dataclasses.replace(request_record(job), finish_s=None, met=False) for job in outcome.failed)
        requests = RequestTable.of([*map(request_record, outcome.finished), *failed])
        steps = None if folder is None else StepTable.of(read_steps(folder / STEPS))
        switches = [switch_record(report) for report in outcome.switches]
        return measure(
            requests,
            self.setting.tiers,
            outcome.seconds,
            steps=steps,
            switches=switches,
            devices=self.given.devices,
        )

    def _summary(self, policy: RunPolicy, outcome: RunOutcome, metrics: Metrics) -> dict[str, object]:
        given = self.given
        return summary(
            metrics,
            self.setting.tiers,
            policy=policy.name,
            workload=self.workload.name,
            profile=self.setting.cost.profile.name,
            devices=given.devices,
            layout=policy.plan.placed,
            rate_scale=given.rate_scale,
            seed=given.seed,
            compile_s=given.compile_s,
            switch=given.switch,
            preemptions=outcome.preemptions,
            decisions=outcome.decisions,
        )

    def _bound(self) -> None:
        found = upper_bound(self.setting, self.workload, candidates(self.setting, self.used))
        _out(
            f"upper bound: goodput {found.goodput:.2f}/s, attainment {found.attainment:.1%}; the best layout of every"
            f" window: {found.best_goodput:.2f}/s, {found.best_attainment:.1%} (docs/simulator/simulator.md)"
        )

    def _capacity(self, name: str, policy: RunPolicy) -> list[pathlib.Path]:
        folders: list[pathlib.Path] = []

        def evaluate(policy: RunPolicy, level: int) -> Figures:
            outcome = self._simulate(self.scaled(level), policy, None, False)
            metrics = self._measure(outcome, None)
            if self.out is not None and level:
                folder = self.out / f"{_file_name(name)}_at_{metrics.rate:.2f}"
                folder.mkdir(parents=True, exist_ok=True)
                text = to_json(self._summary(policy, outcome, metrics))
                (folder / SUMMARY).write_text(text, encoding="utf-8")
                folders.append(folder)
            return figures_of(outcome, self.given.devices)

        found = capacity(policy, 0, functools.cache(evaluate), _GRID, _LOWEST)
        rate = found.factor * self.workload.rate
        words = f"{rate:.2f} requests/s, {found.factor:.3f} times the workload's rate" if rate else "out of reach"
        _out(f"capacity of {policy.name} at 90 % attainment: {words}")
        return folders


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.+-]", "_", name)


def _out(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
