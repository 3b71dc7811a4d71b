"""What a check has found so far: kept in a file after every part, so that a run that was stopped can go on."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

import nitsum_jax
from nitsum_jax.bench.gpu_check.ceilings import Ceilings
from nitsum_jax.errors import InvalidInputError

SCHEMA = "nitsum-gpu-check/2"


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """One timing; milliseconds, of all layers of the model.

    Attributes:
      model: name.
      what: "decode" or "prefill".
      tp: the step is that of one of so many devices, without their exchange.
      vshards: K, separate buffers on the device.
      batch: sequences.
      tokens: new tokens of each.
      context: tokens of each in the cache.
      attention: what attended: "xla", or the kernel.
      step_ms: measured.
      roofline_ms: what the ceilings of the run allow.
    """

    model: str
    what: str
    tp: int
    vshards: int
    batch: int
    tokens: int
    context: int
    attention: str
    step_ms: float
    roofline_ms: float


@dataclasses.dataclass(frozen=True)
class CheckVerdict:
    """Whether something is as it must be, and what was found."""

    passed: bool
    found: str


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What results depend on; those of other surroundings are not gone on with."""

    device: str
    devices: int
    jax_version: str
    version: str
    quick: bool

    @classmethod
    def of(cls, devices: Sequence[jax.Device], *, quick: bool) -> "Surroundings":
        """Those of this process."""
        return cls(devices[0].device_kind, len(devices), jax.__version__, nitsum_jax.__version__, quick)


@dataclasses.dataclass
class CheckFindings:
    """All results; parts that have one are not run again.

    Attributes:
      surroundings: where they come from.
      ceilings: rates of the device.
      checks: verdict of each check, by name.
      steps: timing of each step, by the name of its part.
      left_out: why a part has no result, by name.
    """

    surroundings: Surroundings
    ceilings: Ceilings | None = None
    checks: dict[str, CheckVerdict] = dataclasses.field(default_factory=dict)
    steps: dict[str, CheckRow] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def parts(self) -> int:
        """How many have a result."""
        return len(self.checks) + len(self.steps) + (self.ceilings is not None)


def load(path: pathlib.Path, surroundings: Surroundings) -> CheckFindings:
    """What an earlier run found: of checks what passed, all timings; nothing if there is no file.

    Raises:
      InvalidInputError: the file is something else, or of other surroundings.
    """
    if not path.exists():
        return CheckFindings(surroundings)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"it is of {content['schema']}")
        then = Surroundings(**content["surroundings"])
        found = CheckFindings(
            then,
            content["ceilings"] and Ceilings(**content["ceilings"]),
            {name: CheckVerdict(**one) for name, one in content["checks"].items() if one["passed"]},
            {name: CheckRow(**one) for name, one in content["steps"].items()},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(
            f"--json={path} holds no results of this tool to go on from ({type(error).__name__}: {error}): remove it "
            "or give --fresh"
        ) from None
    if then != surroundings:
        differing = next(
            f"{field.name} {getattr(then, field.name)}, here {getattr(surroundings, field.name)}"
            for field in dataclasses.fields(Surroundings)
            if getattr(then, field.name) != getattr(surroundings, field.name)
        )
        raise InvalidInputError(
            f"--json={path} holds results of {differing}: give another file, or --fresh to replace it"
        )
    return found
