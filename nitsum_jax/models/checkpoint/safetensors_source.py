"""The tensors of a Hugging Face model folder (one safetensors file or many), and writing such a folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.source import missing_tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}


class SafetensorsSource:
    """A `TensorSource` over a model folder; files are mapped, and only the rows or columns asked for are read."""

    def __init__(self, folder: str | Path):
        """Opens the files' headers.

        Raises:
          InvalidInputError: no safetensors files in the folder, or one is missing or damaged.
        """
        self._folder = Path(folder)
        self._files = {name: self._open(name) for name in _file_names(self._folder)}
        self._file_of = {tensor: file for file in self._files.values() for tensor in file.keys()}  # noqa: SIM118

    def names(self) -> Iterable[str]:
        """All tensor names."""
        return self._file_of.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """The whole tensor."""
        return self.read_rows(name, 0, self.shape(name)[0])

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the first axis."""
        rows: np.ndarray = self._slice(name)[start:stop]
        return rows

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop) of the second axis."""
        columns: np.ndarray = self._slice(name)[:, start:stop]
        return columns

    def _open(self, name: str) -> Any:
        path = self._folder / name
        try:
            return safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else "it is cut short or damaged"
            raise InvalidInputError(f"cannot read safetensors file {path}: {reason}; download it again") from None

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise missing_tensor(name, self._folder)
        found = self._file_of[name].get_slice(name)
        if found.get_dtype() not in _FLOATS:
            raise InvalidInputError(
                f"checkpoint tensor '{name}' is of type {found.get_dtype()}; supported are float32, bfloat16, float16"
            )
        return found


def has_safetensors(folder: Path) -> bool:
    """Whether a folder looks like a Hugging Face model folder with safetensors weights."""
    return (folder / INDEX_FILE).exists() or any(folder.glob("*.safetensors"))


class SafetensorsWriter:
    """Writes tensors into a folder as they come, a new file whenever one is full, then the index.

    Holds at most one file's tensors in memory.
    """

    def __init__(self, folder: Path, max_file_bytes: int = 2 * 2**30):
        """Files get at most `max_file_bytes` of tensors each (a larger single tensor gets its own file)."""
        self._folder = folder
        self._max = max_file_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._files: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, value: np.ndarray) -> None:
        """Takes one tensor; may write a file."""
        held = sum(array.nbytes for array in self._pending.values())
        if self._pending and held + value.nbytes > self._max:
            self._flush()
        self._pending[name] = np.ascontiguousarray(value)
        self._total += value.nbytes

    def close(self) -> None:
        """Writes what is left, gives the files their names, and writes the index if there are several."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        if self._pending:
            path = self._folder / f"part-{len(self._files):05d}.tmp"
            path.touch()
            mode = path.stat().st_mode  # save_file makes files that only their owner can read, whatever the umask
            safetensors.numpy.save_file(self._pending, path, metadata={"format": "pt"})
            path.chmod(mode)
            self._files.append((path, list(self._pending)))
            self._pending = {}


def _file_names(folder: Path) -> list[str]:
    index_path = folder / INDEX_FILE
    if index_path.exists():
        try:
            weight_map = json.loads(index_path.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError):
            weight_map = None
        if not isinstance(weight_map, Mapping) or not all(isinstance(file, str) for file in weight_map.values()):
            raise InvalidInputError(f"{index_path} is not a safetensors index; download it again")
        return sorted(set(weight_map.values()))
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InvalidInputError(f"{folder} has no safetensors files; give a Hugging Face model folder with them")
    return names
