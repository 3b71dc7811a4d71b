"""Rooms that one can look into: few entries in a folder, a word on what belongs there, and no name for two things."""

import ast
import pathlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from tools import source_tree

ROOT = source_tree.ROOT
MOST_ENTRIES = 15


def entries(paths: Iterable[pathlib.PurePosixPath]) -> dict[str, int]:
    """How many files and folders each folder below the root shows, BUILD and __init__.py among them."""
    seen = {parent: {p.name for p in group} for parent, group in _by_parent(paths).items()}
    return {str(folder): len(names) for folder, names in seen.items() if str(folder) != "."}


def _by_parent(paths: Iterable[pathlib.PurePosixPath]) -> dict[pathlib.PurePosixPath, set[pathlib.PurePosixPath]]:
    found: dict[pathlib.PurePosixPath, set[pathlib.PurePosixPath]] = defaultdict(set)
    for path in paths:
        for child in (path, *path.parents[:-1]):
            found[child.parent].add(child)
    return found


def test_no_folder_shows_many_entries() -> None:
    assert {f: n for f, n in entries(source_tree.walk_files()).items() if n > MOST_ENTRIES} == {}


def test_entries_are_files_and_folders() -> None:
    paths = map(pathlib.PurePosixPath, ["README.md", "a/BUILD", "a/x.py", "a/b/y.py", "a/b/z.py"])
    assert entries(paths) == {"a": 3, "a/b": 2}


def test_every_folder_of_the_package_says_what_belongs_there() -> None:
    silent = []
    for path in source_tree.python_files():
        if path.parts[0] == source_tree.PACKAGE and path.name == "__init__.py":
            docstring = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
            if len(docstring.split()) < 4:
                silent.append(str(path))
    assert silent == []


def classes_of(text: str) -> list[str]:
    """Names of the classes of one file."""
    return [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]


def test_no_class_name_stands_for_two_things() -> None:
    found: Counter[str] = Counter()
    for path in source_tree.python_files():
        if path.parts[0] == source_tree.PACKAGE and not source_tree.is_generated(path):
            found.update(classes_of((ROOT / path).read_text(encoding="utf-8")))
    assert [name for name, count in found.items() if count > 1] == []


def test_classes_within_functions_count() -> None:
    assert classes_of("class A:\n    class B: ...\ndef f():\n    class C: ...\n") == ["A", "B", "C"]
