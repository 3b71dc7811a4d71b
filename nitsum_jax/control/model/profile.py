"""Profiles: what the steps of one model take on one kind of device, per tensor-parallel degree.

A profile is measured (`nitsum-profile --model=...`) or derived from tables of kernel times (`nitsum-profile
--derive=...`).  docs/simulator/profiles.md describes the file.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.errors import InvalidInputError

SCHEMA = "nitsum-profile/1"
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True)
class TpProfile:
    """Step times of an instance of one TP, in seconds.

    A step of B decode sequences that hold C tokens of context together, and of prefill chunks of T_i new tokens after
    S_i tokens of context, takes the host overhead + dense(B + sum T_i) + head(B + number of chunks) +
    decode_attention(B, C / B) + sum of prefill_attention(T_i, S_i).

    Attributes:
      dense: over new tokens, from 1: the matmuls of all layers and their all-reduces.
      head: over rows whose logits are wanted, from 1: the output head.
      decode_attention: rows are sequences, from 1; columns are their mean context, from 0.  All layers.
      prefill_attention: rows are the new tokens of one chunk, from 1; columns the context before it, from 0.  All
        layers.
      kv_capacity_tokens: tokens of KV cache that the instance holds when its devices keep the weights of this TP only.

    Raises:
      InvalidInputError: a table begins elsewhere, or there is no capacity (on construction).
    """

    dense: Line
    head: Line
    decode_attention: Plane
    prefill_attention: Plane
    kv_capacity_tokens: int

    def __post_init__(self) -> None:
        for name, axis, first in (
            ("dense.tokens", self.dense.points, 1),
            ("head.rows", self.head.points, 1),
            ("decode_attention.sequences", self.decode_attention.rows, 1),
            ("decode_attention.context", self.decode_attention.columns, 0),
            ("prefill_attention.new_tokens", self.prefill_attention.rows, 1),
            ("prefill_attention.context", self.prefill_attention.columns, 0),
        ):
            if axis[0] != first:
                raise InvalidInputError(f"{name} begins with {axis[0]}: it must begin with {first}")
        _check_number(self.kv_capacity_tokens, "kv_capacity_tokens", whole=True, least=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What a step, a transfer and a switch take: everything that control needs to know of a model on a cell.

    Attributes:
      name: what the profile is called; letters, digits and `_.-`.
      model: the model, in words.
      device: the kind of device, in words.
      devices: how many of them the profile speaks of; no TP is larger.
      source: where the figures come from, in words.
      mixed_steps: whether decode and prefill share one step.  If not, decoding and each chunk are steps of their own,
        one after the other, each with its own overhead.
      page_size: tokens in a KV block.
      kv_bytes_per_token: KV bytes of one token, all heads and layers.
      weight_bytes: bytes of all weights.
      host_overhead_s: time of a step in which the device waits for the host.
      link_bytes_per_s: bandwidth from one device to another.
      transfer_latency_s: what a transfer takes before its first byte.
      switch_host_s: the host's part of a layout switch.
      device_put_bytes_per_s: bandwidth of moving arrays by a general resharding, for comparison.
      tps: step times for each TP, ascending; a TP at which the model does not fit is absent.

    Raises:
      InvalidInputError: an entry is out of its range; the line names it (on construction).
    """

    name: str
    model: str
    device: str
    devices: int
    source: str
    mixed_steps: bool
    page_size: int
    kv_bytes_per_token: int
    weight_bytes: int
    host_overhead_s: float
    link_bytes_per_s: float
    transfer_latency_s: float
    switch_host_s: float
    device_put_bytes_per_s: float
    tps: Mapping[int, TpProfile]

    def __post_init__(self) -> None:
        for field in ("name", "model", "device", "source"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise InvalidInputError(f"{field}={value!r} must be a text that is not empty")
        if not isinstance(self.mixed_steps, bool):
            raise InvalidInputError(f"mixed_steps={self.mixed_steps!r} must be true or false")
        for field in ("devices", "page_size", "kv_bytes_per_token", "weight_bytes"):
            _check_number(getattr(self, field), field, whole=True, least=1)
        for field in ("host_overhead_s", "transfer_latency_s", "switch_host_s"):
            _check_number(getattr(self, field), field)
        for field in ("link_bytes_per_s", "device_put_bytes_per_s"):
            _check_number(getattr(self, field), field, least=1)
        if not self.tps:
            raise InvalidInputError("tps is empty: give the step times of at least one TP")
        for tp in self.tps:
            if not isinstance(tp, int) or isinstance(tp, bool) or not 1 <= tp <= self.devices or tp & (tp - 1):
                raise InvalidInputError(f"tps: {tp!r} must be a power of two, at most the {self.devices} devices")
        object.__setattr__(self, "tps", MappingProxyType(dict(sorted(self.tps.items()))))


def _check_number(value: object, name: str, *, whole: bool = False, least: float = 0) -> None:
    kind: type | tuple[type, ...] = int if whole else (int, float)
    if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value) or value < least:  # type: ignore[arg-type,operator]
        raise InvalidInputError(f"{name}={value!r} must be a {'whole ' if whole else ''}number, at least {least:g}")


_PLAIN = tuple(field.name for field in dataclasses.fields(Profile) if field.name != "tps")
_LINES = {"dense": "tokens", "head": "rows"}
_PLANES = {"decode_attention": ("sequences", "context"), "prefill_attention": ("new_tokens", "context")}


def parse_profile(text: str, source: str) -> Profile:
    """Reads a profile from JSON text.

    Args:
      text: one JSON object.
      source: what error messages call the text, such as its file name.

    Raises:
      InvalidInputError: one line that begins with source and names the entry (or the line, where it is not JSON).
    """
    try:
        document = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as e:
        raise InvalidInputError(f"{source}:{e.lineno}: not valid JSON: {e.msg} (column {e.colno})") from e
    except InvalidInputError as e:
        raise InvalidInputError(f"{source}: {e}") from e
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise InvalidInputError(f'{source}: not a profile: "schema" must be "{SCHEMA}", not {found!r}')
    _expect_keys(document, ("schema", *_PLAIN, "tps"), source)
    tables = document["tps"]
    if not isinstance(tables, dict):
        raise InvalidInputError(f"{source}: tps must be an object with one entry for each TP")
    tps = {}
    for key, table in tables.items():
        if not key.isascii() or not key.isdecimal() or key != str(int(key)):
            raise InvalidInputError(f"{source}: tps: {key!r} must be a TP, such as 2")
        tps[int(key)] = _tp(table, f"{source}: tps.{key}")
    return _make(source, Profile, **{name: document[name] for name in _PLAIN}, tps=tps)


def read_profile(path: str | pathlib.Path) -> Profile:
    """Reads a profile from a JSON file; see parse_profile.

    Raises:
      InvalidInputError: the file cannot be read, or parse_profile refuses it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the profile: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path}: the profile is not UTF-8 text (byte {e.start})") from e
    return parse_profile(text, str(path))


def to_json(profile: Profile) -> str:
    """The profile as JSON text, one list of numbers a line; parse_profile reads it back."""
    document: dict[str, Any] = {"schema": SCHEMA} | {name: getattr(profile, name) for name in _PLAIN}
    entries = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in document.items()]
    tps = ",\n".join(f'  "{tp}": {{\n{_tp_text(times)}\n  }}' for tp, times in profile.tps.items())
    return "{\n" + ",\n".join([*entries, f' "tps": {{\n{tps}\n }}']) + "\n}\n"


def write_profile(profile: Profile, path: str | pathlib.Path) -> None:
    """Writes a profile to a JSON file.

    Raises:
      InvalidInputError: the file cannot be written.
    """
    try:
        pathlib.Path(path).write_text(to_json(profile), encoding="utf-8")
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot write the profile: {e.strerror or e}") from e


def _tp_text(times: TpProfile) -> str:
    parts = [f'   "kv_capacity_tokens": {times.kv_capacity_tokens}']
    for name, axis in _LINES.items():
        line: Line = getattr(times, name)
        body = f'"{axis}": {json.dumps(line.points)},\n    "seconds": {json.dumps(line.seconds)}'
        parts.append(f'   "{name}": {{\n    {body}}}')
    for name, (rows, columns) in _PLANES.items():
        plane: Plane = getattr(times, name)
        values = ",\n     ".join(json.dumps(row) for row in plane.seconds)
        axes = f'"{rows}": {json.dumps(plane.rows)},\n    "{columns}": {json.dumps(plane.columns)}'
        parts.append(f'   "{name}": {{\n    {axes},\n    "seconds": [\n     {values}]}}')
    return ",\n".join(parts)


def _tp(table: object, place: str) -> TpProfile:
    entries = _table(table, ("kv_capacity_tokens", *_LINES, *_PLANES), place)
    tables: dict[str, Any] = {"kv_capacity_tokens": entries["kv_capacity_tokens"]}
    for name, axis in _LINES.items():
        part = _table(entries[name], (axis, "seconds"), f"{place}.{name}")
        tables[name] = _make(f"{place}.{name}", _line, part, axis)
    for name, axes in _PLANES.items():
        part = _table(entries[name], (*axes, "seconds"), f"{place}.{name}")
        tables[name] = _make(f"{place}.{name}", _plane, part, *axes)
    return _make(place, TpProfile, **tables)


def _line(part: Mapping[str, Any], axis: str) -> Line:
    return Line(_list(part, axis), _list(part, "seconds"))


def _plane(part: Mapping[str, Any], rows: str, columns: str) -> Plane:
    for i, row in enumerate(_list(part, "seconds")):
        if not isinstance(row, list):
            raise InvalidInputError(f"seconds[{i}] must be a list with one number for each entry of {columns}")
    return Plane(_list(part, rows), _list(part, columns), tuple(tuple(row) for row in part["seconds"]))


def _list(part: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    if not isinstance(part[name], list):
        raise InvalidInputError(f"{name} must be a list of numbers")
    return tuple(part[name])


def _table(value: object, keys: tuple[str, ...], place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InvalidInputError(f"{place} must be an object with {', '.join(keys)}")
    _expect_keys(value, keys, place)
    return value


def _expect_keys(table: Mapping[str, Any], keys: tuple[str, ...], place: str) -> None:
    for key in keys:
        if key not in table:
            raise InvalidInputError(f"{place}: {key} is missing")
    for key in table:
        if key not in keys:
            raise InvalidInputError(f"{place}: unknown entry {key!r}: use {', '.join(keys)}")


def _make(place: str, make: Callable[..., _T], *args: Any, **entries: Any) -> _T:
    """What make returns; its error lines begin with place."""
    try:
        return make(*args, **entries)
    except InvalidInputError as e:
        raise InvalidInputError(f"{place}: {e}") from e


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise InvalidInputError(f"entry {twice!r} stands twice in one object: keep one")
    return table
