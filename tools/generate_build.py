"""Writes the BUILD files from the tree and its imports: `make build-files`.

One py_library per room (a room's sub-folders belong to it), one py_binary per console script of pyproject.toml and per
script of tools/ and benchmarks/, one py_test per test file.  The deps of a target are what its files import, no more.

  python tools/generate_build.py           # write
  python tools/generate_build.py --check   # fail, naming the files, if writing would change anything
"""

import argparse
import pathlib
import re
import sys
import tomllib
from collections import defaultdict

# As a script only this folder is on the path, and the name `tools` is not.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tools import bazel, source_tree
from tools.bazel import Target
from tools.source_tree import PACKAGE, Import

# Import name -> distribution of constraints.txt; a longer name wins.  Names that are not here must be own modules.
DISTRIBUTIONS = {
    "anthropic": "anthropic",
    "absl": "absl-py",
    "flax": "flax",
    "gguf": "gguf",
    "google.protobuf": "protobuf",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "grpc_tools": "grpcio-tools",
    "httptools": "httptools",
    "httpx2": "httpx2",
    "huggingface_hub": "huggingface-hub",
    "hypothesis": "hypothesis",
    "jax": "jax",
    "jaxlib": "jaxlib",
    "jinja2": "jinja2",
    "jsonschema": "jsonschema",
    "llguidance": "llguidance",
    "matplotlib": "matplotlib",
    "ml_dtypes": "ml-dtypes",
    "nbclient": "nbclient",
    "nbformat": "nbformat",
    "numpy": "numpy",
    "openai": "openai",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.trace": "opentelemetry-api",
    "optax": "optax",
    "orbax.checkpoint": "orbax-checkpoint",
    "packaging": "packaging",
    "pandas": "pandas",
    "prometheus_client": "prometheus-client",
    "psutil": "psutil",
    "pydantic": "pydantic",
    "pydantic_core": "pydantic-core",
    "pytest": "pytest",
    "requests": "requests",
    "safetensors": "safetensors",
    "schemathesis": "schemathesis",
    "scipy": "scipy",
    "setuptools": "setuptools",
    "starlette": "starlette",
    "tokenizers": "tokenizers",
    "tqdm": "tqdm",
    "trustme": "trustme",
    "uvicorn": "uvicorn",
    "yaml": "pyyaml",
}
# Only compared with, when they happen to be installed; a Bazel build does without.
OPTIONAL = {"llama_cpp", "torch", "transformers"}
_UNKNOWN = {
    True: "is not a file of this tree",
    False: "is of no known distribution; add it to DISTRIBUTIONS in tools/generate_build.py and to pyproject.toml",
}
PYTHON_RULES = "@rules_python//python:defs.bzl"
_COMMENT = "Written by tools/generate_build.py from the imports (make build-files); edit that instead."
_FACE = pathlib.PurePosixPath(PACKAGE, "llm.py")
_INIT = pathlib.PurePosixPath(PACKAGE, "__init__.py")
_PUBLIC = ("//visibility:public",)
# Files beside the code that it reads when it runs.
_DATA_SUFFIXES = {".proto", ".json", ".html", ".jinja", ".npz", ".txt", ".gguf", ".safetensors", ".typed"}


class Generator:
    """Targets of one tree: `packages()` maps each package's folder to its targets."""

    def __init__(self, root: pathlib.Path = source_tree.ROOT):
        self._root = root
        self._files = list(source_tree.walk_files(root))
        self._python = [p for p in self._files if p.suffix == ".py"]
        self._texts = {p: (root / p).read_text(encoding="utf-8") for p in self._python}
        self._label_of = {source_tree.module_of(p): self._label(p) for p in self._python}
        self._own_tops = {module.partition(".")[0] for module in self._label_of}
        self._scripts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]

    def packages(self) -> dict[str, list[Target]]:
        """Targets by package; the package is the folder in posix form, the empty string for the root."""
        found: dict[str, list[Target]] = defaultdict(list)
        for script, entry in sorted(self._scripts.items()):
            module = entry.partition(":")[0]
            room = self._package(pathlib.PurePosixPath(module.replace(".", "/") + ".py"))
            found[room].append(self._console_script(script, module, room))
            found[""].append(Target("alias", {"name": script, "actual": f"//{room}:{script}", "visibility": _PUBLIC}))
        by_label: dict[str, list[pathlib.PurePosixPath]] = defaultdict(list)
        for path in self._python:
            by_label[self._label(path)].append(path)
        for label, paths in sorted(by_label.items()):
            package, _, name = label.removeprefix("//").partition(":")
            found[package].append(self._target(package, name, paths))
        return dict(found)

    def texts(self) -> dict[str, str]:
        """The text of every BUILD file by its path."""
        return {f"{p}/BUILD".lstrip("/"): self._render(p, targets) for p, targets in sorted(self.packages().items())}

    def deps(self, path: pathlib.PurePosixPath) -> set[str]:
        """Full labels of all that one file imports, its own target left out.

        Raises:
          ValueError: an import is neither an own module nor in DISTRIBUTIONS.
        """
        labels = set()
        # The package itself loads nothing until it is asked for it.
        for item in () if path == _INIT else source_tree.imports_of(self._texts[path], str(path)):
            labels |= self._resolve(item, path)
        # Importing a.b.c runs a/__init__.py as well.
        own = source_tree.module_of(path)
        if own.startswith(PACKAGE + "."):
            labels.add(self._label_of[PACKAGE])
        return labels - {self._label(path)}

    def _resolve(self, item: Import, path: pathlib.PurePosixPath) -> set[str]:
        # `from a.b import c` means the module a.b.c if there is one, and the name c of a.b otherwise.
        modules = {f"{item.module}.{name}" for name in item.names} & self._label_of.keys()
        rest = [name for name in item.names if f"{item.module}.{name}" not in modules]
        if item.module in self._label_of and (rest or not item.names):
            modules.add(item.module)
        if modules:
            return {self._label_of[m] for m in modules}
        if item.top in sys.stdlib_module_names or item.top in OPTIONAL:
            return set()
        dotted = [item.module, *(f"{item.module}.{name}" for name in item.names)]
        hits = [key for key in DISTRIBUTIONS if any(d == key or d.startswith(key + ".") for d in dotted)]
        if not hits:
            raise ValueError(f"{path}:{item.line}: {item.module} " + _UNKNOWN[item.top in self._own_tops])
        return {f"@pypi//{re.sub('[-.]', '_', DISTRIBUTIONS[max(hits, key=len)])}"}

    def _package(self, path: pathlib.PurePosixPath) -> str:
        # A room is one package, whatever folders it has inside; elsewhere every folder is one.
        folder = path.parent.parts
        return "/".join(folder[:2] if folder[:1] == (PACKAGE,) else folder)

    def _label(self, path: pathlib.PurePosixPath) -> str:
        package = self._package(path)
        name = package.rpartition("/")[2] if package.split("/")[0] == PACKAGE else path.stem
        if path == _FACE:  # it stands on the rooms, which stand on the rest of its folder
            name = path.stem
        return f"//{package}:{name}"

    def _target(self, package: str, name: str, paths: list[pathlib.PurePosixPath]) -> Target:
        deps = set[str]().union(*(self.deps(p) for p in paths))
        attributes: dict[str, bazel.Value] = {"name": name, "srcs": tuple(_inside(p, package) for p in paths)}
        if package.split("/")[0] == PACKAGE:
            rule = "py_library"
            attributes["visibility"] = _PUBLIC
            attributes["data"] = self._data(package)
            stubs = [f for f in self._files if f.suffix == ".pyi" and self._package(f) == package]
            attributes["pyi_srcs"] = tuple(_inside(p, package) for p in stubs)
        elif name.startswith("test_"):
            rule = "py_test"
            deps |= {"//tests:conftest", "@pypi//pytest"}
            # The file is run by pytest, under the settings and the conftest of the checkout.
            attributes["main_module"] = "pytest"
            attributes["args"] = (f"{package}/{name}.py",)
            attributes["data"] = ("//:pyproject.toml", *self._data(package))
            if package == "tests/repo":
                attributes["tags"] = ("local", "manual")  # they read the checkout itself, which a sandbox hides
        else:
            rule = "py_binary" if _is_script(self._texts[paths[0]]) else "py_library"
            attributes["testonly"] = package.split("/")[0] == "tests"
            attributes["visibility"] = ("//:__subpackages__",)
            attributes["data"] = self._data(package)
        attributes["deps"] = bazel.sort_labels(_short(label, package) for label in deps)
        return Target(rule, {k: v for k, v in attributes.items() if v not in ((), False)})

    def _console_script(self, script: str, module: str, room: str) -> Target:
        return Target(
            "py_binary",
            {
                "name": script,
                "main_module": module,
                "visibility": _PUBLIC,
                "deps": (":" + room.rpartition("/")[2],),
            },
        )

    def _data(self, package: str) -> tuple[str, ...]:
        found = [f for f in self._files if f.suffix in _DATA_SUFFIXES and self._owner(f) == package]
        return tuple(_inside(f, package) for f in found)

    def _owner(self, path: pathlib.PurePosixPath) -> str:
        # The package of a data file is the nearest folder above it that has Python files (or its room).
        package = self._package(path)
        folders = {self._package(p) for p in self._python}
        while package and package not in folders:
            package = package.rpartition("/")[0]
        return package

    def _render(self, package: str, targets: list[Target]) -> str:
        rules = tuple({t.rule for t in targets} - {"alias"})
        loads = {PYTHON_RULES: rules} if rules else {}
        head = (
            'exports_files([\n    "LICENSE",\n    "constraints.txt",\n    "pyproject.toml",\n])'
            if package == ""
            else ""
        )
        return bazel.render(targets, comment=_COMMENT, loads=loads, head=head)


def _inside(path: pathlib.PurePosixPath, package: str) -> str:
    return str(path.relative_to(package)) if package else str(path)


def _short(label: str, package: str) -> str:
    """The form buildifier prefers: `:x` within a package, `//a/b` for `//a/b:b`."""
    if label.startswith(f"//{package}:"):
        return label[len(f"//{package}") :]
    folder, _, name = label.partition(":")
    return folder if name and folder.rpartition("/")[2] == name else label


def _is_script(text: str) -> bool:
    return re.search(r"^if __name__ == .__main__.:", text, re.MULTILINE) is not None


def stale_files(root: pathlib.Path = source_tree.ROOT) -> dict[str, str | None]:
    """BUILD files that differ from what the tree asks for; None stands for one that should not be there."""
    wanted = Generator(root).texts()
    there = {str(p): (root / p).read_text(encoding="utf-8") for p in source_tree.walk_files(root) if p.name == "BUILD"}
    stale: dict[str, str | None] = {p: text for p, text in wanted.items() if there.get(p) != text}
    stale.update(dict.fromkeys(there.keys() - wanted.keys()))
    return stale


def main() -> int:
    """Writes or checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a BUILD file is out of date")
    check = parser.parse_args().check
    try:
        stale = stale_files()
    except (ValueError, SyntaxError) as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in sorted(stale.items()):
        print(path, "is out of date: run make build-files" if check else "written" if text else "removed")
        if check:
            continue
        if text is None:
            (source_tree.ROOT / path).unlink()
        else:
            (source_tree.ROOT / path).write_text(text, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
