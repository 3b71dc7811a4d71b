"""Runs one cell of the study: a model on a device kind, with one set of targets, under one load."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import to_json
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.policies.bound import candidates, upper_bound
from nitsum_jax.sim.policies.search import (
    Capacity,
    RateGrid,
    best_by_capacity,
    capacity,
    crossing,
    run,
    sample,
    tournament,
)
from nitsum_jax.sim.runs.simulation import RunPolicy
from nitsum_jax.sim.runs.summary import Figures
from nitsum_jax.sim.study.cache import Cache, code_digest, key_of
from nitsum_jax.sim.study.config import Case, Mix, StudyConfig, phases_of
from nitsum_jax.sim.study.loads import Load
from nitsum_jax.sim.workloads.workload import Workload

LOWEST = -24
"""Level below which a policy is said not to reach the target at all."""
_GIVE_UP = 0.3
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StudyCell:
    """What one process works on.

    Attributes:
      config: of the study.
      case: model and targets.
      profile: name.
      mix: load.
      traces: by name.
      source: what the traces are, for the key of results and the page.
      cache: folder.
    """

    config: StudyConfig
    case: Case
    profile: str
    mix: Mix
    traces: Mapping[str, Workload] = dataclasses.field(repr=False)
    source: str
    cache: pathlib.Path

    @property
    def name(self) -> str:
        """Names it in logs and files."""
        return f"{self.case.name}_{self.profile}_{self.mix.name}"

    @functools.cached_property
    def setting(self) -> Setting:
        """What policies are made for."""
        return Setting(CostModel(load_profile(self.profile)), self.case.tiers, self.config.devices)

    @functools.cached_property
    def load(self) -> Load:
        """Its requests at every rate."""
        return Load(self.mix.name, self.traces, phases_of(self.mix, self.case), self.config.seed)

    def check(self) -> None:
        """Finds wrong names of profiles and traces before hours of runs.

        Raises:
          InvalidInputError: there is one, or there are too few devices.
        """
        _ = self.setting, self.load


def run_cell(cell: StudyCell) -> dict[str, Any]:
    """All figures of a cell, as plain values; runs that are in the cache are not run again."""
    return _Runner(cell).run()


class _Runner:
    def __init__(self, cell: StudyCell):
        self.cell = cell
        self.grid = RateGrid(cell.config.ratio)
        self.setting, self.load = cell.setting, cell.load
        self.cache = Cache(cell.cache / f"{cell.name}.jsonl")
        self.about = {
            "profile": to_json(self.setting.cost.profile),
            "tiers": [dataclasses.asdict(tier) for tier in cell.case.tiers],
            "load": [dataclasses.asdict(phase) for phase in self.load.phases],
            "source": cell.source,
            "devices": cell.config.devices,
            "seed": cell.config.seed,
        }
        self.workload = functools.lru_cache(maxsize=6)(lambda level: self.load.at(self.grid.factor(level)))
        self.sampled = functools.lru_cache(maxsize=12)(self._sampled)
        self.curves: dict[str, dict[int, Figures]] = {}

    def _sampled(self, level: int) -> Workload:
        return sample(self.workload(level), self.cell.case.sample_s, max(4, len(self.load.phases)))

    # ---- runs

    def _key(self, kind: str, policy: RunPolicy, level: int, **more: object) -> str:
        return key_of(
            kind=kind,
            about=self.about,
            policy=policy.name,
            scheduler=dataclasses.asdict(policy.scheduler),
            factor=self.grid.factor(level),
            code=code_digest(policy.controller is not None),
            **more,
        )

    def full(self, policy: RunPolicy, level: int) -> Figures:
        """The whole workload; hopeless runs are cut short."""
        key = self._key("full", policy, level)
        value = self.cache.get(key, lambda: run(self.setting, self.workload(level), policy, give_up=0.5).to_json())
        found = Figures.from_json(value)
        self.curves.setdefault(policy.name, {})[level] = found
        return found

    def whole(self, policy: RunPolicy, level: int) -> Figures:
        """The whole workload to its end, for rows that others are compared with however hopeless they are."""
        key = self._key("whole", policy, level)
        return Figures.from_json(self.cache.get(key, lambda: run(self.setting, self.workload(level), policy).to_json()))

    def look(self, policy: RunPolicy, level: int) -> Figures:
        """Some of the workload, given up as soon as it is far from the target."""
        key = self._key("sample", policy, level, sample=self.cell.case.sample_s)
        value = self.cache.get(key, lambda: run(self.setting, self.sampled(level), policy, give_up=_GIVE_UP).to_json())
        return Figures.from_json(value)

    # ---- the cell

    def run(self) -> dict[str, Any]:
        cell, setting = self.cell, self.setting
        adaptive = baselines.adaptive(setting)
        guess = capacity(adaptive, 0, self.full, self.grid, LOWEST)
        self._say(f"adaptive {guess.factor * self.load.rate:.2f}/s")
        results: dict[str, tuple[RunPolicy, Capacity]] = {"adaptive": (adaptive, guess)}
        finalists: list[RunPolicy] = []
        for family, make in baselines.families(setting).items():
            if family == "static-mixed":
                continue  # contained in `static`
            top = tournament(list(make(setting)), max(guess.below, LOWEST), self.look, cell.config.finalists)
            results[family] = best_by_capacity(top, max(guess.below - 1, LOWEST), self.full, self.grid, LOWEST)
            if family == "static":
                finalists = top
            self._say(f"{family} {results[family][1].factor * self.load.rate:.2f}/s {results[family][0].name}")
        results["static"] = max(
            (found for family, found in results.items() if family.startswith("static")), key=lambda r: r[1].factor
        )
        levels = self._levels(results)
        for policy, _ in results.values():
            for level in levels:
                self.full(policy, level)
        values = self._values(results, levels)
        values["bound"] = self._bound(results["adaptive"][1].below, [*finalists, results["static"][0]])
        self._say(f"bound {values['bound']['attainment']:.3f} at {values['bound']['rate']:.2f}/s")
        values["ablations"] = self._ablations(results["adaptive"][1])
        return values

    def _levels(self, results: Mapping[str, tuple[RunPolicy, Capacity]]) -> list[int]:
        """Rates at which all are compared: the highest that the best static layout serves, and adaptive control."""
        return sorted({results[name][1].below for name in ("static", "adaptive") if results[name][1].factor > 0})

    def _values(self, results: Mapping[str, tuple[RunPolicy, Capacity]], levels: list[int]) -> dict[str, Any]:
        cell = self.cell
        rows = {}
        for family, (policy, found) in results.items():
            curve = dict(self.curves.get(policy.name, {}))
            if family.startswith("static-tp"):
                for level in levels:
                    if level in curve and curve[level].given_up:
                        curve[level] = self.whole(policy, level)
            rows[family] = {
                "policy": policy.name,
                "capacity": found.factor * self.load.rate,
                "level": found.below,
                "curve": [[f.rate, f.attainment, f.goodput, f.given_up] for _, f in sorted(curve.items())],
                "at": {str(level): self._row(curve[level]) for level in levels if level in curve},
            }
        return {
            "name": cell.name,
            "case": cell.case.name,
            "profile": cell.profile,
            "model": self.setting.cost.profile.model,
            "device": self.setting.cost.profile.device,
            "mix": cell.mix.name,
            "shifting": cell.mix.shifting,
            "seconds": self.load.seconds,
            "source": cell.source,
            "lowest": self.grid.factor(LOWEST) * self.load.rate,
            "targets": {t.name: [t.ttft_ms, t.tpot_ms] for t in cell.case.tiers},
            "levels": {str(level): self.grid.factor(level) * self.load.rate for level in levels},
            "families": rows,
        }

    def _row(self, figures: Figures) -> dict[str, Any]:
        return {
            "rate": figures.rate,
            "attainment": figures.attainment,
            "goodput": figures.goodput,
            "tiers": {n: t["met"] / max(1, t["finished"]) for n, t in figures.tiers.items()},
            "utilisation": figures.utilisation,
            "switches": figures.switches,
            "stall_s": figures.stall_s,
            "given_up": figures.given_up,
        }

    def _bound(self, level: int, policies: list[RunPolicy]) -> dict[str, Any]:
        adaptive = self.full(baselines.adaptive(self.setting), level)
        plans = [policy.plan for policy in policies] + [_plan(layout) for layout in adaptive.plans]
        chosen = candidates(self.setting, plans)
        value = self._bound_at(level, chosen)
        seconds = self.load.seconds
        found = {
            "rate": value["offered"] / seconds,
            "goodput": value["met"] / seconds,
            "attainment": value["met"] / max(1, value["offered"]),
            "best_goodput": value["best_met"] / seconds,
            "best_attainment": value["best_met"] / max(1, value["offered"]),
            "adaptive": adaptive.goodput,
            "choices": value["choices"],
            "candidates": len(chosen),
        }
        if self.cell.mix.shifting:
            # At neighbouring rates only those run that came near the best of some window at this one.
            close = [policy for policy in chosen if policy.plan.unplaced in value["near"]]

            def reached(other: int) -> float:
                value = self._bound_at(other, chosen if other == level else close)
                return value["best_met"] / max(1, value["offered"])

            found["best_capacity"] = crossing(reached, level, self.grid, LOWEST).factor * self.load.rate
        return found

    def _bound_at(self, level: int, chosen: list[RunPolicy]) -> dict[str, Any]:
        names = sorted(policy.plan.unplaced for policy in chosen)
        key = key_of(
            kind="bound", about=self.about, factor=self.grid.factor(level), code=code_digest(False), names=names
        )

        def compute() -> dict[str, Any]:
            found = upper_bound(self.setting, self.workload(level), chosen)
            return {
                "offered": found.offered,
                "met": found.met,
                "best_met": found.best_met,
                "choices": list(found.choices),
                "near": list(found.near),
            }

        return self.cache.get(key, compute)

    def _ablations(self, found: Capacity) -> dict[str, Any]:
        """Figures of adaptive control with something taken away, at the highest rate that it serves whole."""
        level = max(found.below, LOWEST)
        rows: dict[str, Any] = {}
        for name, policies in baselines.ablations(self.setting).items():
            if not policies:
                continue
            top = tournament(policies, level, self.look, 1)
            figures = self.full(top[0], level)
            rows[name] = {"policy": top[0].name, **self._row(figures)}
            if self.cell.config.ablation_capacity:
                limit = capacity(top[0], level, self.full, self.grid, LOWEST)
                rows[name]["capacity"] = limit.factor * self.load.rate
            self._say(f"{name} {figures.attainment:.3f}")
        return rows

    def _say(self, what: str) -> None:
        _log.info("%s: %s", self.cell.name, what)


def _plan(layout: list[Any]) -> Layout:
    return Layout(tuple(InstanceSpec(tuple(devices), Role(role), tuple(tiers)) for devices, role, tiers in layout))
