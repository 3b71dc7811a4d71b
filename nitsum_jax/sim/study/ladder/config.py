"""The ladder's config file: which cells, loads and seeds.  `ladder.toml` beside this file is one."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study.config_file import check_known, check_positive, read_config
from nitsum_jax.sim.study.loads import Load, LoadPhase, Part
from nitsum_jax.sim.workloads.workload import Workload

_SEED_S = 700.0
"""Seeds begin at different places of the traces, so far apart."""


@dataclasses.dataclass(frozen=True, slots=True)
class LadderCell:
    """One model on some devices under one mix.

    Attributes:
      case: name of the model and its targets.
      profile: name.
      devices: of the cell.
      mix: name.
      rate: requests a second at load 1.
      seeds: of the workloads.
      tiers: targets.
      phases: of the mix, at load 1.
    """

    case: str
    profile: str
    devices: int
    mix: str
    rate: float
    seeds: tuple[int, ...]
    tiers: TierSet
    phases: tuple[LoadPhase, ...]

    def __post_init__(self) -> None:
        check_positive(devices=self.devices, rate=self.rate)
        if not self.seeds:
            raise InvalidInputError("seeds is empty")
        for part in (part for phase in self.phases for part in phase.parts):
            self.tiers.get(part.tier)

    @property
    def name(self) -> str:
        """Names it in files and logs."""
        return f"{self.case}_{self.devices}_{self.mix}"

    def load(self, traces: Mapping[str, Workload], seed: int) -> Load:
        """Its load with the requests of one seed; factor 1 is load 1."""
        return Load(self.mix, traces, self.phases, seed, start_s=seed * _SEED_S)


@dataclasses.dataclass(frozen=True, slots=True)
class LadderConfig:
    """All of it.

    Attributes:
      loads: multiples of a cell's rate.
      search_loads: of these, those at which settings are searched.
      sample_s: seconds of a workload that a search looks at.
      cells: what to run, the most important first.
    """

    loads: tuple[float, ...]
    search_loads: tuple[float, ...]
    sample_s: float
    cells: tuple[LadderCell, ...]

    def __post_init__(self) -> None:
        check_positive(loads=self.loads, search_loads=self.search_loads, sample_s=self.sample_s)


def read_ladder(path: str | pathlib.Path) -> LadderConfig:
    """Reads a config file.

    Args:
      path: of a TOML file, or `ladder` for the one that comes with the package.

    Raises:
      InvalidInputError: it cannot be read, or an entry is missing or wrong; the message names file and entry.
    """
    return read_config(path, pathlib.Path(__file__).parent, _ladder)


def _ladder(values: Mapping[str, Any]) -> LadderConfig:
    check_known(values, {"loads", "search_loads", "sample_s", "cells", "cases", "mixes"})
    cells = tuple(_cell(cell, values["cases"], values["mixes"]) for cell in values["cells"])
    return LadderConfig(tuple(values["loads"]), tuple(values["search_loads"]), values["sample_s"], cells)


def _cell(values: Mapping[str, Any], cases: Mapping[str, Any], mixes: Mapping[str, Any]) -> LadderCell:
    case = cases[values["case"]]
    tiers = TierSet(tuple(Tier(name, **targets) for name, targets in case["tiers"].items()))
    shares = [(phase.get("share", 1.0), phase["parts"]) for phase in mixes[values["mix"]]["phases"]]
    mean = sum(share * sum(part["rate"] for part in parts) for share, parts in shares) / sum(s for s, _ in shares)
    scale = values["rate"] / mean
    phases = tuple(
        LoadPhase(share * case["phase_s"], tuple(Part(**{**part, "rate": part["rate"] * scale}) for part in parts))
        for share, parts in shares
    )
    return LadderCell(**{**values, "seeds": tuple(values["seeds"])}, tiers=tiers, phases=phases)
