"""Results of runs on disk, so that a study that was stopped goes on where it was."""

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import nitsum_jax.control

_PLANNING = "planning"


class Cache:
    """Values by key in one file of lines; what was computed with other code is not found again."""

    def __init__(self, path: pathlib.Path):
        """Opens a file, or begins one."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._values: dict[str, Any] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._values[row["key"]] = row["value"]
                except (ValueError, KeyError):  # the last line of a run that was killed while it wrote
                    continue

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The value of a key; computed, and written down, if it is not there."""
        if key not in self._values:
            value = compute()
            self._values[key] = value
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")
        return self._values[key]


def key_of(**parts: object) -> str:
    """A key of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@functools.cache
def code_digest(planner: bool) -> str:
    """A digest of the code that results depend on: the model of a cell, with or without what adaptive control adds."""
    folder = pathlib.Path(nitsum_jax.control.__path__[0])
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.py"))]
    digest = hashlib.sha256()
    for path in paths:
        if planner or path.parts[0] != _PLANNING:
            digest.update(path.as_posix().encode() + (folder / path).read_bytes())
    return digest.hexdigest()[:16]
