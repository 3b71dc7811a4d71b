"""Quick compilations for modules that do not ask for bits."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
import pytest

from nitsum_jax.engine.executables import step_store
from nitsum_jax.engine.executables.step_store import StepStore
from tests.engine.harness import wait_for_closed_engines
from tests.engine.shared_steps import SharedSteps

# For XLA:CPU.  A step of a tiny model compiles in a quarter of the time, and runs slower and rounds differently.
_QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": "true"}
if jax.__version_info__ < (0, 11):
    _QUICK["xla_cpu_use_fusion_emitters"] = "false"  # later ones have nothing else, and do not know the option
_OPTIONS: dict[str, str | bool] = {name: {"true": True, "false": False}.get(v, v) for name, v in _QUICK.items()}


@contextlib.contextmanager
def compiling_quickly() -> Iterator[None]:
    """Steps, and everything that child processes compile, are compiled quickly, and engines share them."""
    jax.block_until_ready(jax.jit(lambda: jax.numpy.int32(0))())  # this process has read its flags when they change
    compile_with = jax.stages.Lowered.compile
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "quick"  # never to be taken for the real ones
    wait_for_closed_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.stages.Lowered,
            "compile",
            lambda self, given=None: compile_with(self, _OPTIONS | dict(given or {})),
        )
        patch.setattr(StepStore, "beside_jax_cache", lambda: SharedSteps(folder / "steps"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        flags = [f"--{name}={value}" for name, value in _QUICK.items()]
        patch.setenv("XLA_FLAGS", " ".join([os.environ["XLA_FLAGS"], *flags]))
        step_store._surroundings.cache_clear()  # the flags are part of it, so that child processes find the same steps
        yield
        wait_for_closed_engines()
    step_store._surroundings.cache_clear()


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """See `compiling_quickly`.

    For modules that ask what an engine does with requests, layouts and files, and whether the right blocks are at hand
    after a switch.  That steps of all degrees make the same of them as users compile them is asked in
    tests/engine/step/test_program.py and tests/engine/switching/test_switching.py, which do without; so do modules
    that run many or large steps, for these run several times slower.
    """
    with compiling_quickly():
        yield
