"""The tensors of a Hugging Face model folder (one safetensors file or many), and writing such a folder."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.source import is_harmless, missing_tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_log = logging.getLogger(__name__)
_TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
_BARE_EMBEDDING, _BODY, _HEAD = "embed_tokens.weight", "model.", "lm_head."


class SafetensorsSource:
    """A `TensorSource` over a model folder; files are mapped, and only the rows or columns asked for are read."""

    def __init__(self, folder: str | Path):
        """Opens the files' headers.

        Raises:
          InvalidInputError: no safetensors files in the folder, or one is missing or damaged, a tensor is in two of
            them, or index and files contradict each other.
        """
        self._folder = Path(folder)
        index = _index(self._folder)
        names = _file_names(self._folder) if index is None else sorted(set(index.values()))
        files = {name: self._open(name) for name in names}
        holders: dict[str, str] = {}
        for name, file in files.items():
            for tensor in file.keys():  # noqa: SIM118
                other = holders.setdefault(tensor, name)
                if other != name:
                    raise self._contradiction(f"tensor '{tensor}' is both in {other} and in {name}")
        if index is not None:
            self._check_index(index, holders)
        # Models for embeddings are often saved without what a head would have around them.
        bare = _BARE_EMBEDDING in holders
        self._stored = {_whole_name(name) if bare else name: name for name in _text_part(holders)}
        self._stored = {_without_prefix(name): stored for name, stored in self._stored.items()}
        self._file_of = {name: files[holders[stored]] for name, stored in self._stored.items()}

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

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor of whatever type."""
        return tuple(self._of_any_type(name).get_shape())

    def read_stored(self, name: str) -> np.ndarray:
        """The whole of a tensor of whatever type that numpy has."""
        values: np.ndarray = self._of_any_type(name)[:]
        return values

    def _check_index(self, index: Mapping[str, str], holders: Mapping[str, str]) -> None:
        for tensor, name in index.items():
            if holders.get(tensor) != name:
                raise self._contradiction(f"{INDEX_FILE} says that tensor '{tensor}' is in {name}, which lacks it")
        for tensor, name in holders.items():
            if tensor not in index and not is_harmless(tensor):
                raise self._contradiction(f"tensor '{tensor}' is in {name}, but not in {INDEX_FILE}")

    def _contradiction(self, what: str) -> InvalidInputError:
        return InvalidInputError(f"{what} (folder {self._folder}); download the model again into an empty folder")

    def _open(self, name: str) -> Any:
        path = self._folder / name
        try:
            return safetensors.safe_open(path, framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else "it is cut short or damaged"
            raise InvalidInputError(f"cannot read safetensors file {path}: {reason}; download it again") from None

    def _of_any_type(self, name: str) -> Any:
        if name not in self._file_of:
            raise missing_tensor(name, self._folder)
        return self._file_of[name].get_slice(self._stored[name])

    def _slice(self, name: str) -> Any:
        found = self._of_any_type(name)
        if found.get_dtype() not in _FLOATS:
            raise InvalidInputError(
                f"checkpoint tensor '{name}' is of type {found.get_dtype()}; supported are float32, bfloat16, float16"
            )
        return found


def _whole_name(name: str) -> str:
    """The name of a tensor of a model that was saved without its head, as one with a head calls it."""
    return name if name.startswith((_BODY, _HEAD)) else _BODY + name


def _text_part(names: Iterable[str]) -> list[str]:
    """The tensors of the language model, where there are others beside it, for pictures."""
    names = list(names)
    text = [name for name in names if _without_prefix(name) != name]
    if text and len(text) < len(names):
        _log.warning(
            "the checkpoint has %d tensors beside its language model: only text is served", len(names) - len(text)
        )
    return text or names


def _without_prefix(name: str) -> str:
    """The name of a tensor of a language model that is a part of a larger one, as it is called on its own."""
    for prefix, plain in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


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


def _index(folder: Path) -> dict[str, str] | None:
    """Which file has which tensor, by the index; None if there is none."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    doubled: list[str] = []

    def pairs(entries: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(entries)
        if len(table) < len(entries):
            keys = [key for key, _ in entries]
            doubled.extend(key for key in table if keys.count(key) > 1)
        return table

    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=pairs)["weight_map"]
    except (ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidInputError(f"{path} is not a safetensors index; download it again")
    if doubled:
        raise InvalidInputError(f"{path} names '{doubled[0]}' twice; download it again")
    if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        raise InvalidInputError(
            f"{folder} has {SINGLE_FILE} and an index of other files ({INDEX_FILE}); remove the one that is not meant"
        )
    return weight_map


def _file_names(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).exists():
        return [SINGLE_FILE]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InvalidInputError(f"{folder} has no safetensors files; give a Hugging Face model folder with them")
    return names
