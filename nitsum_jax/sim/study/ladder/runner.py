"""Runs the ladder: searches every rung's settings on a sample, then runs the best of them at every load and seed."""

import dataclasses
import functools
import logging
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import to_json
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.meshes.layout import InstanceSpec, Layout
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.policies.search import sample
from nitsum_jax.sim.runs.simulation import RunOutcome, simulate
from nitsum_jax.sim.study.cache import Cache, code_digest, key_of
from nitsum_jax.sim.study.ladder.config import LadderCell, LadderConfig
from nitsum_jax.sim.study.ladder.rungs import Entrant, rungs
from nitsum_jax.sim.workloads.workload import Workload

_QUANTILES = 8
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Runs:
    """What a cell's runs are made of.

    Attributes:
      config: of the ladder.
      cell: which.
      traces: by name.
      source: what the traces are.
      folder: of the cache.
    """

    config: LadderConfig
    cell: LadderCell
    traces: Mapping[str, Workload] = dataclasses.field(repr=False)
    source: str
    folder: pathlib.Path

    @functools.cached_property
    def setting(self) -> Setting:
        """What policies are made for."""
        return Setting(CostModel(load_profile(self.cell.profile)), self.cell.tiers, self.cell.devices)

    def check(self) -> None:
        """Finds wrong names of profiles and traces before an hour of runs.

        Raises:
          InvalidInputError: there is one, or there are too few devices.
        """
        _ = self.setting, self.cell.load(self.traces, self.cell.seeds[0])


def run_ladder(runs: Runs) -> dict[str, Any]:
    """All figures of a cell as plain values; what is in the cache is not run again."""
    cell, config, setting = runs.cell, runs.config, runs.setting
    cache = Cache(runs.folder / f"ladder_{cell.name}.jsonl")
    plain = {key: value for key, value in dataclasses.asdict(cell).items() if key != "seeds"}  # those run stay for more
    plain["profile"] = to_json(setting.cost.profile)
    about = {"cell": plain, "source": runs.source, "sample": config.sample_s}

    @functools.cache
    def workload(seed: int, load: float) -> Workload:
        return cell.load(runs.traces, seed).at(load)

    def score(entrant: Entrant, seed: int, load: float, *, sampled: bool) -> dict[str, Any]:
        policy = entrant.policy
        key = key_of(
            about=about,
            policy=entrant.name,
            scheduler=dataclasses.asdict(policy.scheduler),
            variant=[policy.timeouts, policy.device_put, entrant.dealt],
            seed=seed,
            load=load,
            sampled=sampled,
            code=code_digest(policy.controller is not None),
        )

        def compute() -> dict[str, Any]:
            whole = workload(seed, load)
            parts = max(4, len(cell.phases))
            return serve(setting, sample(whole, config.sample_s, parts) if sampled else whole, entrant)

        found: dict[str, Any] = cache.get(key, compute)
        return found

    seeds, first = cell.seeds, cell.seeds[0]
    rows: dict[str, Any] = {}
    for rung, make in rungs(setting, loads_of(workload(first, 1.0))).items():
        entrants = list(make())
        if len(entrants) > 1:
            chosen: dict[str, Entrant] = {}
            for load in config.search_loads:
                found = {e.name: score(e, first, load, sampled=True)["goodput"] for e in entrants}
                best = max(entrants, key=lambda e: found[e.name])
                chosen[best.name] = best
            entrants = list(chosen.values())
        at: list[dict[str, Any]] = []
        for load in config.loads:
            scores = {e.name: [score(e, seed, load, sampled=False) for seed in seeds] for e in entrants}
            best_name = max(scores, key=lambda name: sum(s["goodput"] for s in scores[name]))
            at.append({"load": load, "policy": best_name, "seeds": scores[best_name]})
        rows[rung] = at
        _log.info("%s: %s %s", cell.name, rung, _goodputs(at))
    return {
        "name": cell.name,
        "profile": cell.profile,
        "model": setting.cost.profile.model,
        "device": setting.cost.profile.device,
        "devices": cell.devices,
        "mix": cell.mix,
        "rate": cell.rate,
        "seconds": workload(first, 1.0).seconds,
        "seeds": list(seeds),
        "source": runs.source,
        "targets": {t.name: [t.ttft_ms, t.tpot_ms] for t in cell.tiers},
        "rungs": rows,
    }


def loads_of(workload: Workload) -> list[TierLoad]:
    """What a whole workload is like, for the planner's estimate."""
    loads = []
    for tier in workload.tiers:
        requests = workload.only(tier).requests
        prompts = sorted(request.prompt_tokens for request in requests)
        quantiles = tuple(prompts[int((i + 0.5) * len(prompts) / _QUANTILES)] for i in range(_QUANTILES))
        output = sum(request.output_tokens for request in requests) / len(requests)
        loads.append(TierLoad(tier, len(requests) / workload.seconds, 1.0, quantiles, output))
    return loads


def serve(setting: Setting, workload: Workload, entrant: Entrant) -> dict[str, Any]:
    """One run: requests offered and met of each tier, goodput and attainment."""
    parts = _dealt(workload, entrant) if entrant.dealt else [(workload, entrant)]
    outcomes = [_simulate(setting, piece, one) for piece, one in parts]
    tiers: dict[str, list[int]] = {}
    for tier in workload.tiers:
        offered = sum(request.tier == tier for request in workload.requests)
        met = sum(job.tier.name == tier and job.met() for outcome in outcomes for job in outcome.finished)
        tiers[tier] = [offered, met]
    met = sum(row[1] for row in tiers.values())
    return {
        "rate": len(workload.requests) / workload.seconds,
        "goodput": met / workload.seconds,
        "attainment": met / max(1, len(workload.requests)),
        "tiers": tiers,
        "switches": sum(len(outcome.switches) for outcome in outcomes),
    }


def _simulate(setting: Setting, workload: Workload, entrant: Entrant) -> RunOutcome:
    return simulate(
        workload,
        setting.tiers,
        setting.cost,
        entrant.policy,
        num_devices=setting.num_devices,
        max_batch=entrant.max_batch,
    )


def _dealt(workload: Workload, entrant: Entrant) -> list[tuple[Workload, Entrant]]:
    """A cell for each instance, with its share of the requests."""
    instances: Sequence[InstanceSpec] = entrant.policy.plan.instances
    parts = []
    for i, instance in enumerate(instances):
        piece = dataclasses.replace(workload, requests=workload.requests[i :: len(instances)])
        policy = dataclasses.replace(entrant.policy, plan=Layout((instance,)))
        parts.append((piece, dataclasses.replace(entrant, policy=policy)))
    return parts


def _goodputs(rows: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"{statistics.fmean(seed['goodput'] for seed in row['seeds']):.1f}" for row in rows)
