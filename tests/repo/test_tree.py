"""Shape of the repository: small files, links, packaging, pins, and nothing of the machine it was written on."""

import ast
import pathlib
import re
import tomllib

import pytest
import setuptools
from packaging.requirements import Requirement

import nitsum_jax
from tools import source_tree

ROOT = source_tree.ROOT
MAX_LINES = 500
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".toml", ".txt", ".proto", ".yml", ".yaml", ".ipynb", ".bazel", ".html", ""}
# Where people and machines keep their own things; nothing in the repository may depend on them.
_MACHINE_PATH = re.compile(r"(?<![\w.:/}~-])/(?:home|root|Users|tmp|mnt|opt|srv|data|scratch)/[\w.-]+")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text_files() -> list[pathlib.PurePosixPath]:
    """Files of the tree that people read; names starting with a dot at the root are looked at as well."""
    hidden = [pathlib.PurePosixPath(n) for n in (".ci/run", ".gitignore", ".bazelrc", ".bazelignore")]
    return [p for p in source_tree.walk_files() if p.suffix in TEXT_SUFFIXES] + hidden


def test_files_are_small() -> None:
    long = {}
    for path in source_tree.python_files():
        lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
        if lines > MAX_LINES and not source_tree.is_generated(path):
            long[str(path)] = lines
    assert long == {}


def test_no_machine_paths() -> None:
    own = {str(ROOT), str(pathlib.Path.home())} - {"/"}
    found = []
    for path in text_files():
        if path.parts[:2] == ("tests", "repo"):
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if _MACHINE_PATH.search(line) or any(f"{folder}/" in line for folder in own):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []


def test_machine_paths_are_recognised() -> None:
    assert _MACHINE_PATH.search("open('/home/me/x')")
    assert _MACHINE_PATH.search("cd /tmp/here")
    assert not _MACHINE_PATH.search("https://example.org/home/me")
    assert not _MACHINE_PATH.search("nitsum_jax/data/x")


def test_links_lead_into_the_package() -> None:
    for name in ("models", "meshes", "server"):
        link = ROOT / name
        assert link.is_symlink()
        assert link.readlink() == pathlib.Path("nitsum_jax", name)
        assert link.is_dir()


def test_every_folder_of_the_package_is_packaged() -> None:
    folders = {p.parent for p in source_tree.python_files() if p.parts[0] == source_tree.PACKAGE}
    assert [str(f) for f in sorted(folders) if not (ROOT / f / "__init__.py").exists()] == []


def test_only_the_package_is_packaged() -> None:
    include = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    found = setuptools.find_namespace_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in found} == {"nitsum_jax"}
    assert {f"nitsum_jax.{room}" for room in ("control", "engine", "meshes", "models", "runtime", "server")} <= set(
        found
    )


def test_test_folders_are_namespace_packages() -> None:
    found = [str(p) for p in source_tree.python_files() if p.parts[0] == "tests" and p.name == "__init__.py"]
    assert found == [], "tests are imported by their full name; an __init__.py would change how pytest finds them"


def test_console_scripts_exist() -> None:
    for entry in PYPROJECT["project"]["scripts"].values():
        module, _, function = entry.partition(":")
        tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, entry


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_all_that_pyproject_names_once_for_every_python(python: str) -> None:
    assert f"Programming Language :: Python :: {python}" in PYPROJECT["project"]["classifiers"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert [str(pin) for pin in pins if [one.operator for one in pin.specifier] != ["=="]] == []
    versions = {_normal(pin.name): next(iter(pin.specifier)).version for pin in pins}
    assert len(versions) == len(pins)
    pinned = set(versions)
    project = PYPROJECT["project"]
    for needed in map(Requirement, project["dependencies"]):
        assert needed.specifier.contains(versions[_normal(needed.name)]), needed
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = [re.split(r"[^\w.-]", text)[0].lower() for text in project["dependencies"]]
    assert len(set(names)) == len(names)
    assert {_normal(re.split(r"[\[<>=]", n)[0]) for n in named} - pinned == set()


def test_version_is_one() -> None:
    module = (ROOT / "MODULE.bazel").read_text(encoding="utf-8")
    assert f'version = "{nitsum_jax.__version__}",\n)' in module


def test_licence_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PYPROJECT["project"]["license"] == "Apache-2.0"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_axis_of_tensor_parallelism_is_named_in_one_place() -> None:
    found = []
    for path in source_tree.python_files():
        if path.parts[0] != source_tree.PACKAGE or path.parts[1] not in {"meshes", "models", "engine", "bench"}:
            continue
        nodes = list(ast.walk(ast.parse((source_tree.ROOT / path).read_text(encoding="utf-8"))))
        # A key, such as a group of a regular expression, is no axis, and neither is the text of a layout.
        keys = {id(node.slice) for node in nodes if isinstance(node, ast.Subscript)}
        texts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        others = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in keys | texts)
        found += [str(path) for node in others if node.value == "tp"]
    assert found == ["nitsum_jax/meshes/mesh.py"]


def test_parameters_move_between_devices_by_one_path() -> None:
    calls = {
        path.name
        for path in source_tree.python_files()
        if path.parts[:2] == (source_tree.PACKAGE, "meshes")
        and "device_put(" in (source_tree.ROOT / path).read_text(encoding="utf-8")
    }
    assert calls == {"host_copy.py", "reshard.py"}  # from the host, and from anywhere
