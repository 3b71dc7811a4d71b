"""A GGUF file: its metadata, and its tensors as views into the mapped file.

The reader of the `gguf` package keeps every string of the vocabulary as several small arrays, so opening a file with a
large tokenizer takes seconds; this reads the same into plain Python values in a fraction of that, and turns every kind
of damage into one error.  `fields`, `get_field` and `tensors` look like those of `gguf.GGUFReader`.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from nitsum_jax.errors import InvalidInputError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# GGUF value types as little-endian numpy dtypes.
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_PLAIN = {
    gguf.GGMLQuantizationType.F32: "<f4",
    gguf.GGMLQuantizationType.F16: "<f2",
    gguf.GGMLQuantizationType.F64: "<f8",
}


@dataclasses.dataclass(frozen=True, slots=True)
class GgufField:
    """One metadata value: a string, a number, a bool, or a list of them."""

    value: Any

    def contents(self) -> Any:
        """The value; a method because gguf.GGUFReader has it so."""
        return self.value


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor.

    Attributes:
      name: in GGUF's own naming (`blk.0.attn_q.weight`).
      shape: in GGUF's own order, innermost first ([in features, out features]).
      tensor_type: how it is stored.
      data: view into the file, outermost first; quantised rows are bytes.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: gguf.GGMLQuantizationType
    data: np.ndarray


class GgufFile:
    """An open GGUF file.

    Attributes:
      path: where it is.
      fields: metadata by key.
      tensors: all tensors, in file order.
    """

    def __init__(self, path: str | Path):
        """Maps the file and reads its header.

        Raises:
          InvalidInputError: not there, not a GGUF file, cut short, or of a kind not supported.
        """
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            reason = error.strerror if isinstance(error, OSError) else "it is empty"
            raise InvalidInputError(f"cannot read GGUF file {self.path}: {reason}") from None
        if self._bytes[:4] != _MAGIC:
            raise InvalidInputError(f"{self.path} is not a GGUF file (its first bytes say otherwise)")
        self._at = 4
        try:
            self._read_header()
        except InvalidInputError:
            raise
        except (struct.error, ValueError, OverflowError, MemoryError, RecursionError):
            raise self.damaged() from None

    def get_field(self, key: str) -> GgufField | None:
        """The metadata under a key, if it is there."""
        return self.fields.get(key)

    def damaged(self) -> InvalidInputError:
        """The error to raise where the file does not hold what it should."""
        return InvalidInputError(f"GGUF file {self.path} is cut short or damaged: download it again")

    def _read_header(self) -> None:
        version = self._number(_UINT32)
        if version not in _VERSIONS:
            raise InvalidInputError(
                f"GGUF file {self.path} is of version {version} (or big-endian); supported are little-endian 2 and 3"
            )
        num_tensors, num_fields = self._number(_UINT64), self._number(_UINT64)
        self.fields: dict[str, GgufField] = {}
        for _ in range(num_fields):
            key = self._string()
            if key in self.fields:
                raise InvalidInputError(f"GGUF file {self.path} has the key '{key}' twice: convert it again")
            self.fields[key] = GgufField(self._value(self._number(_UINT32)))
        alignment = self.fields.get("general.alignment", GgufField(_DEFAULT_ALIGNMENT)).value
        infos = [self._tensor_info() for _ in range(num_tensors)]
        seen: set[str] = set()
        for name, *_ in infos:
            if name in seen:
                raise InvalidInputError(f"GGUF file {self.path} has tensor '{name}' twice: convert it again")
            seen.add(name)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError("no alignment")
        start = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(name, dims, kind, start + offset) for name, dims, kind, offset in infos]

    def _number(self, layout: struct.Struct) -> int:
        (value,) = layout.unpack_from(self._bytes, self._at)
        self._at += layout.size
        return int(value)

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._bytes):
            raise ValueError("past the end")
        value = self._bytes[self._at : end]
        self._at = end
        return value

    def _string(self) -> str:
        return self._take(self._number(_UINT64)).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._number(_UINT32), self._number(_UINT64)
            if item in _NUMBERS:
                dtype = np.dtype(_NUMBERS[item])
                return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
            return [self._value(item) for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError("unknown value type")
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._number(_UINT32)
        dims = tuple(self._number(_UINT64) for _ in range(rank))
        return name, dims, self._number(_UINT32), self._number(_UINT64)

    def _tensor(self, name: str, dims: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            tensor_type = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise InvalidInputError(
                f"GGUF file {self.path}: tensor '{name}' is stored in unknown type {kind}; "
                "quantise the model to a type that the gguf package reads (Q4_1, Q8_0, F16, ...)"
            ) from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
        if not dims or dims[0] % block:
            raise ValueError("a row is not made of whole blocks")
        row_bytes = dims[0] // block * block_bytes
        size = row_bytes * math.prod(dims[1:])
        if offset + size > len(self._bytes):
            raise ValueError("past the end")
        raw = np.frombuffer(self._bytes, np.uint8, size, offset)
        if tensor_type in _PLAIN:
            raw = raw.view(_PLAIN[tensor_type])
        data = raw.reshape((*reversed(dims[1:]), -1) if size else (*reversed(dims),))
        return GgufTensor(name, dims, tensor_type, data)
