"""What stands in the source tree and what it imports; shared by the BUILD generator and the structure tests."""

import ast
import dataclasses
import os
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "nitsum_jax"

# Folders that are never ours: build results and environments.  Names starting with a dot are left out as well.
_NOT_SOURCE = {"__pycache__", "build", "dist", "node_modules"}


@dataclasses.dataclass(frozen=True, slots=True)
class Import:
    """One imported name as it is written: `module` is dotted; `names` are those of a `from` import, else empty."""

    module: str
    names: tuple[str, ...]
    line: int

    @property
    def top(self) -> str:
        """The first part of the dotted name."""
        return self.module.partition(".")[0]


def walk_files(root: pathlib.Path = ROOT) -> Iterator[pathlib.PurePosixPath]:
    """Yields every file of the source tree relative to `root`, sorted, links not followed."""
    for folder, subfolders, names in os.walk(root):
        here = pathlib.Path(folder)
        subfolders[:] = sorted(s for s in subfolders if _is_source_folder(here / s))
        for name in sorted(names):
            if not (here / name).is_symlink() and not name.endswith(".pyc"):
                yield pathlib.PurePosixPath((here / name).relative_to(root).as_posix())


def python_files(root: pathlib.Path = ROOT) -> list[pathlib.PurePosixPath]:
    """All Python files of the tree, generated ones included."""
    return [p for p in walk_files(root) if p.suffix == ".py"]


def is_generated(path: pathlib.PurePath) -> bool:
    """Whether protoc wrote the file."""
    return path.name.endswith(("_pb2.py", "_pb2_grpc.py", "_pb2.pyi"))


def imports_of(text: str, where: str) -> list[Import]:
    """All imports of one file, those inside functions and TYPE_CHECKING blocks included.

    Args:
      text: the source.
      where: the file's name, for messages.

    Raises:
      ValueError: the file uses a relative import, which hides what room it reaches into.
    """
    found = []
    for node in ast.walk(ast.parse(text, where)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{where}:{node.lineno}: write the import in full instead of relative to the file")
            found.append(Import(node.module, tuple(alias.name for alias in node.names), node.lineno))
    return sorted(found, key=lambda i: (i.line, i.module))


def module_of(path: pathlib.PurePosixPath) -> str:
    """The dotted name of a Python file: `a/b.py` is a.b and `a/__init__.py` is a."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_source_folder(path: pathlib.Path) -> bool:
    if path.name.startswith(".") or path.name in _NOT_SOURCE or path.name.endswith(".egg-info"):
        return False
    return not path.is_symlink() and not (path / "pyvenv.cfg").exists()
