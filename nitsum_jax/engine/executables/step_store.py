"""Compiled steps kept on disk, so that a second start neither traces nor compiles.

JAX's persistent cache saves the compilation, but not the tracing of a model, which takes as long again on a small
machine; and on the CPU an executable that came out of that cache cannot be serialised again, which `rebind` needs.
Hence steps have a store of their own, beside it.
"""

import functools
import hashlib
import logging
import os
import pathlib
import pickle
import platform
import tempfile

import jax
import jaxlib

from nitsum_jax.engine.executables.rebind import Blueprint
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program

_LOG = logging.getLogger(__name__)
_FOLDER = "steps"
_ROOMS = ("engine", "models", "meshes")  # whose sources a step is made of


class StepStore:
    """Blueprints in a folder, under names that change with everything they depend on."""

    def __init__(self, folder: pathlib.Path | None):
        """Keeps nothing if `folder` is None."""
        self._folder = folder

    @classmethod
    def beside_jax_cache(cls) -> "StepStore":
        """The store in the folder of JAX's persistent cache; one that keeps nothing if that cache is off."""
        folder = jax.config.values["jax_compilation_cache_dir"]
        if not folder or not jax.config.values["jax_enable_compilation_cache"] or "://" in folder:
            return cls(None)
        return cls(pathlib.Path(folder) / _FOLDER)

    def get(self, program: Program, shape: StepShape, device: jax.Device, tp: int) -> Blueprint | None:
        """A blueprint that an earlier start kept, or None."""
        path = self._path(program, shape, device, tp)
        if path is None or not path.exists():
            return None
        try:
            # The folder is the user's own, like that of JAX's cache; what lies there is trusted as code is.
            blueprint = pickle.loads(path.read_bytes())
        except Exception as error:  # damaged or half written: compile again and replace it
            _LOG.warning("a compiled step in %s cannot be read and is made anew: %s", path.parent, error)
            return None
        return blueprint if isinstance(blueprint, Blueprint) else None

    def put(self, program: Program, shape: StepShape, device: jax.Device, tp: int, blueprint: Blueprint) -> None:
        """Keeps a blueprint; a folder that cannot be written to costs time, not the start."""
        path = self._path(program, shape, device, tp)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                pickle.dump(blueprint, file)
            os.replace(file.name, path)
        except OSError as error:
            _LOG.warning("compiled steps are not kept in %s: %s", path.parent, error)

    def _path(self, program: Program, shape: StepShape, device: jax.Device, tp: int) -> pathlib.Path | None:
        if self._folder is None:
            return None
        what = "\n".join([repr(program), repr(shape), str(tp), device.platform, device.device_kind, _surroundings()])
        return self._folder / f"{hashlib.sha256(what.encode()).hexdigest()[:40]}.step"


@functools.cache
def _surroundings() -> str:
    """Everything outside a program that its machine code depends on: our sources, JAX, its flags, this processor."""
    sources = _hash_of_sources(pathlib.Path(__file__).resolve().parents[2])
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    settings = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    ]
    promotion = str(jax.config.values["jax_numpy_dtype_promotion"])
    return "\n".join(
        [sources, jax.__version__, jaxlib.__version__, platform.machine(), processor, *settings, promotion]
    )


def _hash_of_sources(package: pathlib.Path) -> str:
    """Changes with every file of the rooms that steps are made of, however deep it lies, and with its name."""
    found = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            content = path.read_bytes()
            found.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return found.hexdigest()
