"""What a run writes down, one JSON object a line: requests.jsonl, steps.jsonl, switches.jsonl, decisions.jsonl.

Numbers are written in full, so what is computed from a log agrees bit for bit with what the run itself saw.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from nitsum_jax.errors import InvalidInputError

REQUESTS = "requests.jsonl"
STEPS = "steps.jsonl"
SWITCHES = "switches.jsonl"
DECISIONS = "decisions.jsonl"
SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request, written when it ended.

    Attributes:
      id: unique in the run.
      tier: name of its tier.
      arrival_s, first_token_s, finish_s: seconds from the start of the run; None if it did not come so far.
      prompt_tokens, output_tokens: lengths, at least 1.
      instances: numbers of the instances that worked on it, in order.
      met: whether it met both targets of its tier.
    """

    id: str
    tier: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    first_token_s: float | None
    finish_s: float | None
    instances: tuple[int, ...]
    met: bool


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of an instance.

    Attributes:
      instance: number of the instance; another plan's instances have other numbers.
      devices: numbers of its devices.
      tp: how many they are.
      start_s, end_s: seconds from the start of the run.
      decode_sequences: sequences that got one token each.
      context_tokens: tokens of KV cache that they held together before it.
      prefill_tokens: new tokens of each prefill chunk.
      prefill_context: tokens before each chunk.
    """

    instance: int
    devices: tuple[int, ...]
    tp: int
    start_s: float
    end_s: float
    decode_sequences: int
    context_tokens: int
    prefill_tokens: tuple[int, ...]
    prefill_context: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchRecord:
    """One switch of the layout.

    Attributes:
      time_s: when the last instance that had to stop had stopped.
      from_layout, to_layout: text of the plans, devices named: `tp4@0,1,2,3:prefill+tp1@4`.
      devices: of the instances that stopped.
      stall_s: until their successors began, from time_s.
      kv_bytes: copied between devices.
      sequences: requests that changed their instance.
      requeued: of these, how many are computed again.
    """

    time_s: float
    from_layout: str
    to_layout: str
    devices: tuple[int, ...]
    stall_s: float
    kv_bytes: float
    sequences: int
    requeued: int


@dataclasses.dataclass(frozen=True, slots=True)
class DecisionRecord:
    """One decision of a controller.

    Attributes:
      time_s: when.
      inputs: what it was made from.
      candidates: what was compared.
      choice: the plan to have.
      reason: one line.
    """

    time_s: float
    inputs: Any
    candidates: Any
    choice: str
    reason: str


_Record = TypeVar("_Record", RequestRecord, StepRecord, SwitchRecord, DecisionRecord)


def to_line(record: RequestRecord | StepRecord | SwitchRecord | DecisionRecord) -> str:
    """The record as one line of JSON, with its line end."""
    if isinstance(record, StepRecord):
        # There are millions of these; repr of whole numbers, floats and lists of them is JSON.
        return (
            f'{{"instance": {record.instance}, "devices": {list(record.devices)}, "tp": {record.tp},'
            f' "start_s": {record.start_s!r}, "end_s": {record.end_s!r},'
            f' "decode_sequences": {record.decode_sequences}, "context_tokens": {record.context_tokens},'
            f' "prefill_tokens": {list(record.prefill_tokens)}, "prefill_context": {list(record.prefill_context)}}}\n'
        )
    return json.dumps({name: getattr(record, name) for name in _FIELDS[type(record)]}) + "\n"


def read_requests(path: str | pathlib.Path) -> Iterator[RequestRecord]:
    """The records of requests.jsonl, read as they are asked for.

    Raises:
      InvalidInputError: `path:line: what is wrong`, or the file cannot be read.
    """
    return _read(path, RequestRecord)


def read_steps(path: str | pathlib.Path) -> Iterator[StepRecord]:
    """The records of steps.jsonl; see read_requests."""
    return _read(path, StepRecord)


def read_switches(path: str | pathlib.Path) -> Iterator[SwitchRecord]:
    """The records of switches.jsonl; see read_requests."""
    return _read(path, SwitchRecord)


def read_decisions(path: str | pathlib.Path) -> Iterator[DecisionRecord]:
    """The records of decisions.jsonl; see read_requests."""
    return _read(path, DecisionRecord)


def read_summary(path: str | pathlib.Path) -> dict[str, Any]:
    """What summary.json holds.

    Raises:
      InvalidInputError: it cannot be read or is not a JSON object.
    """
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the summary: {e.strerror or e}") from e
    except ValueError as e:
        raise InvalidInputError(f"{path}: not valid JSON: {' '.join(str(e).split())}") from e
    if not isinstance(found, dict):
        raise InvalidInputError(f"{path}: a summary is a JSON object")
    return found


def _read(path: str | pathlib.Path, kind: type[_Record]) -> Iterator[_Record]:
    names = _FIELDS[kind]
    checks = _CHECKS[kind]
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    values = [row[name] for name in names]
                    for i, check in checks:
                        values[i] = check(values[i])
                except KeyError as e:
                    raise InvalidInputError(f"{path}:{number}: {e} is missing") from e
                except (ValueError, TypeError) as e:
                    raise InvalidInputError(f"{path}:{number}: not a {kind.__name__}: {_one_line(e)}") from e
                yield kind(*values)
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the log: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path}: the log is not UTF-8 text") from e


_FIELDS: Mapping[type, tuple[str, ...]] = {
    kind: tuple(field.name for field in dataclasses.fields(kind))
    for kind in (RequestRecord, StepRecord, SwitchRecord, DecisionRecord)
}


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} must be a whole number, 0 or more")
    return value


def _number(value: object) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} must be a number")
    return value  # type: ignore[return-value]


def _number_or_none(value: object) -> float | None:
    return None if value is None else _number(value)


def _wholes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} must be a list of whole numbers")
    return tuple(map(_whole, value)) if value else ()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} must be true or false")
    return value


_BY_TYPE: Mapping[Any, Callable[[Any], Any]] = {
    int: _whole,
    float: _number,
    float | None: _number_or_none,
    tuple[int, ...]: _wholes,
    str: _text,
    bool: _flag,
}
_CHECKS: Mapping[type, Sequence[tuple[int, Callable[[Any], Any]]]] = {
    kind: [(i, _BY_TYPE[f.type]) for i, f in enumerate(dataclasses.fields(kind)) if f.type in _BY_TYPE]
    for kind in _FIELDS
}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
