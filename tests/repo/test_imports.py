"""The rooms' rule: imports point downward only, and the pure room stays pure."""

import pathlib
import subprocess
import sys

import pytest

from tools import source_tree
from tools.source_tree import PACKAGE, Import

# What stands below each room, and may therefore be imported by it.  `errors` is the floor that all stand on.
BELOW = {
    "cluster": {"server", "runtime", "engine", "control", "profiles", "models", "meshes"},
    "bench": {"server", "runtime", "engine", "sim", "control", "models", "meshes", "profiles"},
    "server": {"runtime", "engine", "control", "profiles", "models", "meshes"},
    "runtime": {"engine", "control", "profiles", "models", "meshes"},
    "sim": {"control", "profiles"},
    "engine": {"models", "meshes"},
    "models": {"meshes"},
    "control": set(),
    "meshes": set(),
    "profiles": {"control"},
}
FLOOR = {f"{PACKAGE}.errors", f"{PACKAGE}.__version__"}
# The face of the package for notebooks stands on runtime, so that it needs no network; the package's own file names it,
# and loads it only when it is asked for.
FACE = {"llm": BELOW["runtime"] | {"runtime"}, "__init__": {"llm", "engine"}}
CONTROL_MAY = {"numpy", "scipy"}
# The language of layouts, the map of vshards and arithmetic: no jax in them, so policies, the simulator and profiles
# may use them, too.
PURE_MESHES = {f"{PACKAGE}.meshes.layout", f"{PACKAGE}.meshes.vshards", f"{PACKAGE}.meshes.workspace"}
PURE_ROOMS = {"control", "sim", "profiles"}
# Third-party packages of certain rooms: the network belongs to server, what knows models to models and above.
NETWORK = {"grpc", "grpc_health", "grpc_reflection", "google", "starlette", "uvicorn", "httptools", "prometheus_client"}
SOCKETS = {"http", "socket", "socketserver", "ssl", "urllib"}  # of the standard library
ON_THE_NETWORK = {"server", "bench", "cluster"}
MODEL_FORMATS = {"flax", "gguf", "orbax", "safetensors", "tokenizers"}
TEMPLATES = {"jinja2"}  # of chats in models, of reports in sim
ROOT_LINKS = {"meshes", "models", "server"}
PURE_MODULES = (
    "nitsum_jax",
    "nitsum_jax.errors",
    "nitsum_jax.meshes.layout",
    "nitsum_jax.meshes.vshards",
    "nitsum_jax.meshes.workspace",
)


def violation(path: pathlib.PurePosixPath, item: Import) -> str | None:
    """Why the file may not import that, or None if it may."""
    if item.top in ROOT_LINKS:
        return f"{item.top} is a link for readers; import {PACKAGE}.{item.module}"
    if path.parts[0] != PACKAGE:
        return None
    if item.top == "tests" or item.top == "tools":
        return "the package cannot use what is not packaged"
    room = path.parts[1] if len(path.parts) > 2 else None
    below = FACE.get(path.stem) if room is None else BELOW[room] | {room}
    names = [item.module] if item.module != PACKAGE else [f"{PACKAGE}.{n}" for n in item.names]
    for name in names:
        if item.top != PACKAGE or name in FLOOR or (room in PURE_ROOMS and name in PURE_MESHES):
            continue
        other = name.split(".")[1] if "." in name else PACKAGE
        if below is None or other not in below:
            return f"{other} does not stand below {room or 'the top level'}"
    if room in {"runtime", "engine", "control"} and item.top in SOCKETS:
        return f"{room} opens no sockets"
    if item.top in sys.stdlib_module_names or item.top == PACKAGE:
        return None
    if room is None:
        return None if path.stem == "llm" and item.top == "jax" else "the top level imports the standard library only"
    if room == "control" and item.top not in CONTROL_MAY:
        return "control imports the standard library, numpy and scipy only"
    if room != "cluster" and item.top == "ray":
        return "only cluster knows Ray"
    if room not in ON_THE_NETWORK and item.top in NETWORK:
        return "only server, and what loads it, speak to the network"
    if room in {"meshes", "sim"} and item.top in MODEL_FORMATS:
        return f"{room} knows no model"
    if room == "meshes" and item.top in TEMPLATES:
        return "meshes writes no text"
    return None


def test_imports_point_downward() -> None:
    found = []
    for path in source_tree.python_files():
        text = (source_tree.ROOT / path).read_text(encoding="utf-8")
        for item in source_tree.imports_of(text, str(path)):
            if reason := violation(path, item):
                found.append(f"{path}:{item.line}: {item.module}: {reason}")
    assert found == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nitsum_jax/meshes/layout.py", "from nitsum_jax.models import config"),
        ("nitsum_jax/meshes/layout.py", "import flax.nnx"),
        ("nitsum_jax/models/config.py", "from nitsum_jax.engine.request import Request"),
        ("nitsum_jax/models/checkpoint/io.py", "def f():\n    import nitsum_jax.server.launch.main"),
        ("nitsum_jax/engine/engine.py", "from nitsum_jax import server"),
        ("nitsum_jax/engine/engine.py", "import grpc.aio"),
        ("nitsum_jax/engine/engine.py", "from nitsum_jax.runtime.backend import Backend"),
        ("nitsum_jax/runtime/calls.py", "from nitsum_jax.server.state import ServerState"),
        ("nitsum_jax/runtime/calls.py", "import starlette.routing"),
        ("nitsum_jax/runtime/calls.py", "import socket"),
        ("nitsum_jax/llm.py", "from nitsum_jax.server.launch import main"),
        ("nitsum_jax/server/state.py", "from nitsum_jax.cluster import router"),
        ("nitsum_jax/bench/main.py", "from nitsum_jax.cluster import front"),
        ("nitsum_jax/server/state.py", "from ray import serve"),
        ("nitsum_jax/control/planning/planner.py", "import jax"),
        ("nitsum_jax/control/planning/planner.py", "from nitsum_jax.meshes.mesh import instance_mesh"),
        ("nitsum_jax/sim/policies/named.py", "from nitsum_jax.meshes.reshard import reshard"),
        ("nitsum_jax/errors.py", "import numpy"),
        ("nitsum_jax/errors.py", "from nitsum_jax.meshes import layout"),
        ("nitsum_jax/models/config.py", "from tests.models import helpers"),
        ("tests/meshes/test_layout.py", "from meshes.layout import Layout"),
    ],
)
def test_upward_import_is_found(path: str, code: str) -> None:
    (item,) = source_tree.imports_of(code, path)
    assert violation(pathlib.PurePosixPath(path), item) is not None


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nitsum_jax/server/launch/main.py", "from nitsum_jax.models.loading import open_model"),
        ("nitsum_jax/server/state.py", "from nitsum_jax.runtime.backend import Backend"),
        ("nitsum_jax/runtime/calls.py", "from nitsum_jax.engine.request import Request"),
        ("nitsum_jax/llm.py", "from nitsum_jax.runtime.calls import check"),
        ("nitsum_jax/engine/engine.py", "from nitsum_jax.engine.request import Request"),
        ("nitsum_jax/engine/engine.py", "from nitsum_jax.meshes import layout"),
        ("nitsum_jax/control/planning/planner.py", "from nitsum_jax.errors import NitsumError"),
        ("nitsum_jax/control/planning/planner.py", "import numpy as np"),
        ("nitsum_jax/control/planning/planner.py", "from nitsum_jax.meshes.layout import Layout"),
        ("nitsum_jax/sim/policies/named.py", "from nitsum_jax.meshes.vshards import VshardMap"),
        ("nitsum_jax/server/launch/main.py", "import grpc.aio"),
    ],
)
def test_downward_import_is_allowed(path: str, code: str) -> None:
    (item,) = source_tree.imports_of(code, path)
    assert violation(pathlib.PurePosixPath(path), item) is None


def test_relative_import_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.py:1: write the import in full"):
        source_tree.imports_of("from . import b", "a.py")


def test_pure_modules_load_without_jax() -> None:
    control = [source_tree.module_of(p) for p in source_tree.python_files() if p.parts[:2] == (PACKAGE, "control")]
    code = f"import importlib, sys\nfor m in {[*PURE_MODULES, *control]}: importlib.import_module(m)\n"
    code += "sys.exit('jax was loaded' if 'jax' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source_tree.ROOT)
    assert done.returncode == 0, done.stderr


def test_notebooks_load_no_network() -> None:
    runtime = [source_tree.module_of(p) for p in source_tree.python_files() if p.parts[:2] == (PACKAGE, "runtime")]
    code = f"import importlib, sys\nfor m in {['nitsum_jax.llm', *runtime]}: importlib.import_module(m)\n"
    code += (
        "sys.exit(', '.join(sorted({'nitsum_jax.server', 'grpc', 'starlette', 'uvicorn'} & sys.modules.keys())) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=source_tree.ROOT)
    assert done.returncode == 0, done.stderr


# ---- circles: also of imports that only a type checker sees, or that a function makes


def imports_between(texts: dict[str, str]) -> dict[str, set[str]]:
    """By module of the package, those that it imports, whenever and for whomever."""
    found = {}
    for module, text in texts.items():
        names = set()
        for item in source_tree.imports_of(text, module):
            full = [f"{item.module}.{name}" for name in item.names]
            names |= {name for name in full if name in texts}
            if not item.names or any(name not in texts for name in full):
                names.add(item.module)
        found[module] = (names & texts.keys()) - {module}
    return found


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Modules that can be reached from themselves, or that stand between two such."""
    left = dict(imports)
    while ends := {m for m, below in left.items() if not below & left.keys()}:
        left = {m: below for m, below in left.items() if m not in ends}
    while tops := left.keys() - set().union(*left.values()):
        left = {m: below for m, below in left.items() if m not in tops}
    return set(left)


def test_no_import_goes_in_a_circle() -> None:
    texts = {
        source_tree.module_of(path): (source_tree.ROOT / path).read_text(encoding="utf-8")
        for path in source_tree.python_files()
        if path.parts[0] == PACKAGE
    }
    assert circles(imports_between(texts)) == set(), "say with a small Protocol what the lower one needs of the upper"


@pytest.mark.parametrize(
    "lower",
    [
        "from nitsum_jax.a import x",
        "from nitsum_jax import a",
        "import nitsum_jax.a",
        "def f():\n    from nitsum_jax.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from nitsum_jax.a import x",
    ],
)
def test_circles_are_found(lower: str) -> None:
    texts = {
        "nitsum_jax": "",
        "nitsum_jax.a": "from nitsum_jax.b import y",
        "nitsum_jax.b": "from nitsum_jax.c import z",
        "nitsum_jax.c": lower,
        "nitsum_jax.d": "import nitsum_jax.a, nitsum_jax.e",
        "nitsum_jax.e": "import os",
    }
    assert circles(imports_between(texts)) == {"nitsum_jax.a", "nitsum_jax.b", "nitsum_jax.c"}
    assert circles(imports_between(texts | {"nitsum_jax.c": ""})) == set()
