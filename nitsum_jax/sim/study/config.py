"""The study's config file: which models, targets and loads.

study.toml and quick.toml beside this file are two of them; docs/simulator/simulator.md describes the entries.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study.config_file import check_known, check_positive, read_config
from nitsum_jax.sim.study.loads import LoadPhase, Part


@dataclasses.dataclass(frozen=True, slots=True)
class Mix:
    """Phases of a load before a model's rates and times are put in.

    Attributes:
      name: what tables call it.
      shifting: whether it has several phases.
      phases: their share of the time, and their parts.
    """

    name: str
    shifting: bool
    phases: tuple[LoadPhase, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One model with one set of targets.

    Attributes:
      name: of the targets.
      profiles: names of profiles, one per device kind.
      tiers: targets.
      rate: requests a second at factor 1, a guess at what the cell can serve.
      steady_s: length of a steady load.
      phase_s: length of a phase of a shifting load.
      sample_s: seconds of the first look of a search.
      mixes: names of the mixes to run; empty: all.
    """

    name: str
    profiles: tuple[str, ...]
    tiers: TierSet
    rate: float
    steady_s: float
    phase_s: float
    sample_s: float
    mixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_positive(rate=self.rate, steady_s=self.steady_s, phase_s=self.phase_s, sample_s=self.sample_s)


@dataclasses.dataclass(frozen=True, slots=True)
class StudyConfig:
    """All of it.

    Attributes:
      devices: of the cell.
      seed: of what is random.
      ratio: of neighbouring rates (see `search.Grid`).
      finalists: policies of a family that run the whole workload.
      ablation_capacity: whether capacities of ablations are searched, or only their figures at two rates.
      mixes: loads.
      cases: models.
    """

    devices: int
    seed: int
    ratio: float
    finalists: int
    ablation_capacity: bool
    mixes: tuple[Mix, ...]
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        check_positive(devices=self.devices, finalists=self.finalists)


def read_study(path: str | pathlib.Path) -> StudyConfig:
    """Reads a config file.

    Args:
      path: of a TOML file, or the name of one that comes with the package (`study`, `quick`).

    Raises:
      InvalidInputError: it cannot be read, or an entry is missing or wrong; the message names file and entry.
    """
    return read_config(path, pathlib.Path(__file__).parent, _study)


def _study(values: Mapping[str, Any]) -> StudyConfig:
    known = {field.name for field in dataclasses.fields(StudyConfig)}
    check_known(values, known)
    mixes = tuple(_mix(name, mix) for name, mix in values["mixes"].items())
    cases = tuple(_case(name, case) for name, case in values["cases"].items())
    for case in cases:
        for name in case.mixes:
            if name not in {mix.name for mix in mixes}:
                raise InvalidInputError(f"case {case.name!r}: unknown mix {name!r}")
        for mix in mixes_of(case, mixes):
            for part in (part for phase in mix.phases for part in phase.parts):
                case.tiers.get(part.tier)
    plain = {key: values[key] for key in known - {"mixes", "cases"}}
    return StudyConfig(mixes=mixes, cases=cases, **plain)


def mixes_of(case: Case, mixes: Sequence[Mix]) -> list[Mix]:
    """The mixes that a case is run with."""
    return [mix for mix in mixes if not case.mixes or mix.name in case.mixes]


def _mix(name: str, values: Mapping[str, Any]) -> Mix:
    phases = tuple(
        LoadPhase(phase.get("share", 1.0), tuple(Part(**part) for part in phase["parts"])) for phase in values["phases"]
    )
    return Mix(name, len(phases) > 1, phases)


def _case(name: str, values: Mapping[str, Any]) -> Case:
    tiers = TierSet(tuple(Tier(tier, **targets) for tier, targets in values["tiers"].items()))
    rest = {key: value for key, value in values.items() if key not in {"tiers", "profiles", "mixes"}}
    return Case(name, tuple(values["profiles"]), tiers, mixes=tuple(values.get("mixes", ())), **rest)


def phases_of(mix: Mix, case: Case) -> tuple[LoadPhase, ...]:
    """The phases of a mix with a case's times and rates: parts' rates are shares of the case's rate."""
    length = case.phase_s if mix.shifting else case.steady_s
    return tuple(
        LoadPhase(
            phase.seconds * length,
            tuple(dataclasses.replace(part, rate=part.rate * case.rate) for part in phase.parts),
        )
        for phase in mix.phases
    )
