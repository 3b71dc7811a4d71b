"""BUILD files tell the truth: each Python file in one target, deps equal to imports, the form that tools write."""

import pathlib
import shutil
from collections import Counter

import pytest

from tools import bazel, generate_build, source_tree
from tools.bazel import Target

ROOT = source_tree.ROOT
RULES = {"py_library", "py_binary", "py_test"}


def committed() -> dict[str, list[Target]]:
    """All targets of the tree by package, as the BUILD files have them."""
    found = {}
    for path in source_tree.walk_files():
        if path.name == "BUILD":
            package = "" if str(path.parent) == "." else str(path.parent)
            found[package] = bazel.parse((ROOT / path).read_text(encoding="utf-8"), str(path))
    return found


def copy_tree(to: pathlib.Path) -> pathlib.Path:
    """A small tree of the same make, for changing."""
    for room in ("control", "meshes"):
        (to / "nitsum_jax" / room).mkdir(parents=True)
        (to / "nitsum_jax" / room / "__init__.py").write_text("")
    (to / "nitsum_jax" / "__init__.py").write_text("")
    (to / "nitsum_jax" / "errors.py").write_text("import enum\n")
    (to / "nitsum_jax" / "meshes" / "cell.py").write_text("import jax\nfrom nitsum_jax.errors import NitsumError\n")
    (to / "tests" / "meshes").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", to / "tests")
    (to / "tests" / "meshes" / "helpers.py").write_text("import numpy as np\n")
    test = "from nitsum_jax.meshes import cell\nfrom tests.meshes.helpers import f\n"
    (to / "tests" / "meshes" / "test_cell.py").write_text(test)
    scripts = '[project.scripts]\ncell = "nitsum_jax.meshes.cell:run"\n'
    (to / "pyproject.toml").write_text(scripts)
    for path, text in generate_build.Generator(to).texts().items():
        (to / path).write_text(text)
    assert generate_build.stale_files(to) == {}
    return to


def test_every_python_file_stands_in_exactly_one_target() -> None:
    counts = Counter(
        f"{package}/{src}".lstrip("/")
        for package, targets in committed().items()
        for target in targets
        for src in target.labels("srcs")
    )
    assert counts == Counter(map(str, source_tree.python_files()))


def test_every_label_has_its_target() -> None:
    packages = committed()
    own = {f"//{package}:{target.name}" for package, targets in packages.items() for target in targets}
    pinned = {_pypi(line.partition("==")[0]) for line in _constraints()}
    for package, targets in packages.items():
        for target in targets:
            actual = target.attributes.get("actual", ())
            for label in (*target.labels("deps"), *([str(actual)] if actual else [])):
                full = bazel.absolute(label, package)
                assert full in own or full.removeprefix("@pypi//").partition(":")[0] in pinned, (package, label)


def test_deps_agree_with_imports() -> None:
    generator = generate_build.Generator()
    for package, targets in committed().items():
        for target in targets:
            if target.rule not in RULES or not target.labels("srcs"):
                continue
            paths = [pathlib.PurePosixPath(package, src) for src in target.labels("srcs")]
            wanted = {bazel.absolute(d, package) for p in paths for d in generator.deps(p)}
            wanted.discard(f"//{package}:{target.name}")
            if target.rule == "py_test":  # pytest runs the file, with the conftest
                wanted |= {bazel.absolute("@pypi//pytest", ""), "//tests:conftest"}
            assert {bazel.absolute(d, package) for d in target.labels("deps")} == wanted, (package, target.name)


def test_targets_have_no_cycle() -> None:
    edges = {
        f"//{package}:{target.name}": {bazel.absolute(d, package) for d in target.labels("deps")}
        for package, targets in committed().items()
        for target in targets
    }
    done: set[str] = set()
    while ready := {label for label, deps in edges.items() if label not in done and deps & edges.keys() <= done}:
        done |= ready
    assert done == edges.keys()


def test_console_scripts_have_binaries() -> None:
    binaries = {t.name for targets in committed().values() for t in targets if t.rule == "py_binary"}
    assert {"nitsum-serve", "nitsum-generate", "nitsum-convert"} <= binaries


def test_files_are_as_the_generator_writes_them() -> None:
    assert sorted(generate_build.stale_files()) == [], "run make build-files"


def test_generator_follows_a_new_import(tmp_path: pathlib.Path) -> None:
    root = copy_tree(tmp_path)
    with (root / "nitsum_jax" / "control" / "__init__.py").open("a") as file:
        file.write("def f():\n    from scipy import stats\n")
    stale = generate_build.stale_files(root)
    assert list(stale) == ["nitsum_jax/control/BUILD"]
    assert '"@pypi//scipy"' in str(stale["nitsum_jax/control/BUILD"])


def test_generator_follows_a_new_and_a_removed_file(tmp_path: pathlib.Path) -> None:
    root = copy_tree(tmp_path)
    (root / "nitsum_jax" / "meshes" / "new.py").write_text("")
    (root / "tests" / "meshes" / "test_cell.py").unlink()
    (root / "tests" / "meshes" / "helpers.py").unlink()
    stale = generate_build.stale_files(root)
    assert '"new.py"' in str(stale["nitsum_jax/meshes/BUILD"])
    assert stale["tests/meshes/BUILD"] is None


def test_generated_targets(tmp_path: pathlib.Path) -> None:
    packages = generate_build.Generator(copy_tree(tmp_path)).packages()
    binary, room = packages["nitsum_jax/meshes"]
    assert (binary.rule, binary.attributes["main_module"]) == ("py_binary", "nitsum_jax.meshes.cell")
    assert room.labels("deps") == ("//nitsum_jax", "@pypi//jax")
    helpers, test = packages["tests/meshes"]
    assert helpers.labels("deps") == ("@pypi//numpy",)
    assert test.labels("deps") == (":helpers", "//nitsum_jax/meshes", "//tests:conftest", "@pypi//pytest")
    assert test.labels("args") == ("tests/meshes/test_cell.py",)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_thing", "of no known distribution"),
        ("import nitsum_jax.meshes.gone", "not a file of this tree"),
    ],
)
def test_unknown_imports_are_named(tmp_path: pathlib.Path, code: str, message: str) -> None:
    root = copy_tree(tmp_path)
    (root / "nitsum_jax" / "meshes" / "cell.py").write_text(code)
    with pytest.raises(ValueError, match=rf"nitsum_jax/meshes/cell\.py:1: .*{message}"):
        generate_build.stale_files(root)


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        "py_library(name = 'a', srcs = glob(['*.py']))",
        "py_library('a')",
        "py_library(srcs = [])",
        "[py_library(name = n) for n in ['a']]",
        "__import__('os').remove('x')",
    ],
)
def test_build_files_are_read_not_run(text: str) -> None:
    with pytest.raises(ValueError, match=r"malformed|BUILD:1: "):
        bazel.parse(text, "BUILD")


def test_render_and_parse_are_inverse() -> None:
    target = Target("py_test", {"name": "a", "testonly": True, "srcs": ("a.py", "b.py"), "deps": (":x", "@pypi//jax")})
    text = bazel.render([target], comment="c", loads={"@r//:d.bzl": ("py_test",)})
    assert bazel.parse(text, "BUILD") == [target]


def test_labels_in_full_and_in_order() -> None:
    assert bazel.absolute(":x", "a/b") == "//a/b:x"
    assert bazel.absolute("//a/b", "c") == "//a/b:b"
    assert bazel.absolute("@pypi//jax", "c") == "@pypi//jax:jax"
    assert bazel.sort_labels(["@pypi//a", "//z", ":b", "//z", ":a"]) == (":a", ":b", "//z", "@pypi//a")


def _constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _pypi(distribution: str) -> str:
    return distribution.lower().replace("-", "_").replace(".", "_")
