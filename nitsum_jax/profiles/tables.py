"""Reads tables of measured kernel times: one folder, four CSV files for each kind of device.

DEVICE_gemm_bf16.csv: m, n, k, ms; x[m, k] @ w[k, n]
DEVICE_prefill_attention_bf16.csv: batch_size, prompt_tokens, q_heads, kv_heads, head_dim, ms; causal, one layer
DEVICE_decode_attention_bf16.csv: batch_size, context_tokens, q_heads, kv_heads, head_dim, ms; one new token, one layer
DEVICE_collectives_bf16.csv: op, source, devices, bytes, ms
"""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from nitsum_jax.errors import InvalidInputError

Heads = tuple[int, int, int]
"""Query heads, KV heads, head width."""


@dataclasses.dataclass(frozen=True, slots=True)
class TimeGrid:
    """Seconds on a grid; nan where nothing was measured.

    Attributes:
      axes: rising values, one array for each axis.
      seconds: an array with one axis for each of them.
    """

    axes: tuple[np.ndarray, ...]
    seconds: np.ndarray

    def without(self, axis: int, values: set[int]) -> "TimeGrid":
        """The grid without these values of an axis."""
        keep = np.array([value not in values for value in self.axes[axis].tolist()])
        axes = tuple(points[keep] if i == axis else points for i, points in enumerate(self.axes))
        return TimeGrid(axes, np.compress(keep, self.seconds, axis))


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """The kernel times of one kind of device, in seconds.

    Attributes:
      gemm: over (m, n, k).
      prefill: for each kind of heads, over (sequences, prompt tokens).
      decode: for each kind of heads, over (sequences, context tokens).
      collectives: for each (operation, source, devices), over bytes.
    """

    gemm: TimeGrid
    prefill: Mapping[Heads, TimeGrid]
    decode: Mapping[Heads, TimeGrid]
    collectives: Mapping[tuple[str, str, int], TimeGrid]


def read_tables(folder: str | pathlib.Path, device: str) -> Tables:
    """Reads the four files of a device.

    Args:
      folder: where they lie.
      device: what their names begin with, such as `h100_sxm`.

    Raises:
      InvalidInputError: a file is missing or not as described; one line with file and line number.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise InvalidInputError(
            f"{folder}: not a folder with kernel tables: give one that holds {device}_gemm_bf16.csv"
        )
    gemm = _read(folder / f"{device}_gemm_bf16.csv", ("m", "n", "k"))
    heads = ("q_heads", "kv_heads", "head_dim")
    prefill = _read(folder / f"{device}_prefill_attention_bf16.csv", (*heads, "batch_size", "prompt_tokens"))
    decode = _read(folder / f"{device}_decode_attention_bf16.csv", (*heads, "batch_size", "context_tokens"))
    collectives = _read(folder / f"{device}_collectives_bf16.csv", ("op", "source", "devices", "bytes"))
    return Tables(
        gemm=_grid(gemm),
        prefill={key: _grid(part) for key, part in _grouped(prefill, 3).items()},  # type: ignore[misc]
        decode={key: _grid(part) for key, part in _grouped(decode, 3).items()},  # type: ignore[misc]
        collectives={key: _grid(part) for key, part in _grouped(collectives, 3).items()},  # type: ignore[misc]
    )


_Rows = dict[tuple[str | int, ...], float]


def _read(path: pathlib.Path, columns: tuple[str, ...]) -> _Rows:
    """Seconds by the values of the columns; all but `op` and `source` are whole numbers above 0."""
    rows: _Rows = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in (*columns, "ms") if name not in (reader.fieldnames or ())]
            if missing:
                raise InvalidInputError(
                    f"{path}:1: column {missing[0]!r} is missing: the table needs {', '.join(columns)}, ms"
                )
            for row in reader:
                place = f"{path}:{reader.line_num}"
                key = tuple(
                    row[name] if name in ("op", "source") else _whole(row[name], name, place) for name in columns
                )
                if key in rows:
                    raise InvalidInputError(f"{place}: the same measurement stands twice: keep one")
                rows[key] = _milliseconds(row["ms"], place) / 1000
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the table: {e.strerror or e}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise InvalidInputError(f"{path}: not a CSV table: {' '.join(str(e).split())}") from e
    if not rows:
        raise InvalidInputError(f"{path}: the table has no rows")
    return rows


def _whole(text: str | None, name: str, place: str) -> int:
    try:
        value = int(text or "")
    except ValueError:
        value = 0
    if value < 1:
        raise InvalidInputError(f"{place}: {name}={text!r} must be a whole number, at least 1")
    return value


def _milliseconds(text: str | None, place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise InvalidInputError(f"{place}: ms={text!r} must be a number above 0")
    return value


def _grouped(rows: _Rows, count: int) -> dict[tuple[str | int, ...], _Rows]:
    """Rows that share the first values of their key, by these."""
    groups: dict[tuple[str | int, ...], _Rows] = {}
    for key, seconds in rows.items():
        groups.setdefault(key[:count], {})[key[count:]] = seconds
    return groups


def _grid(rows: _Rows) -> TimeGrid:
    keys = np.array(list(rows), dtype=np.int64)
    axes, places = zip(*(np.unique(keys[:, i], return_inverse=True) for i in range(keys.shape[1])), strict=True)
    seconds = np.full([len(axis) for axis in axes], np.nan)
    seconds[places] = list(rows.values())
    return TimeGrid(axes, seconds)
