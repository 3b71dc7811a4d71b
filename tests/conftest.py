"""One setting for every test: 8 emulated CPU devices and a JAX that forgives nothing.

All of it goes through environment variables, which JAX reads when it is imported.  So this file needs no JAX itself
(tests of the pure rooms stay fast), and servers and tools that tests start as processes run under the same rules.
"""

import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

NUM_DEVICES = 8
_CACHE_OWNER = pytest.StashKey[pathlib.Path]()

_JAX_ENVIRONMENT = {
    # An accelerator that happens to be there must not change what is tested.
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES),
    # Mixing dtypes or ranks by accident costs speed on devices and precision everywhere: make it an error.
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Many tests compile the same tiny models; the cache below is shared by tests, workers and child processes.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

hypothesis.settings.register_profile(
    "nitsum",
    deadline=None,  # a first call may compile
    # Machines that run the suite are slow and shared; an example that takes long is not a bug.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,  # a failure on one machine must be a failure on the next
)
hypothesis.settings.load_profile("nitsum")


def pytest_configure(config: pytest.Config) -> None:
    """Sets JAX's environment; runs before any test module is imported."""
    if "jax" in sys.modules:
        raise pytest.UsageError(
            "JAX was imported before tests/conftest.py could set its devices: drop the plugin that does"
        )
    # Flags left in a shell could ask for another number of devices.
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ.update(_JAX_ENVIRONMENT)
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the folder of the process that started them
        folder = pathlib.Path(tempfile.mkdtemp(prefix="nitsum-test-cache-"))
        config.stash[_CACHE_OWNER] = folder
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compilation cache of this session."""
    folder = config.stash.get(_CACHE_OWNER, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


# For XLA:CPU.  A step of a tiny model compiles in a quarter of the time, and runs slower and rounds differently.
_QUICK = {
    "xla_cpu_use_fusion_emitters": "false",
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
}


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    """Steps, and everything that child processes compile, are compiled quickly.

    For modules that ask what an engine does with requests, layouts and files.  Those that hold promises about the bits
    of its numbers compile as users do.
    """
    import jax

    from nitsum_jax.engine.step_store import StepStore
    from tests.engine.harness import wait_for_closed_engines

    jax.block_until_ready(jax.jit(lambda: jax.numpy.int32(0))())  # this process has read its flags when they change
    compile_with = jax.stages.Lowered.compile
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in _QUICK.items()}
    folder = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]) / "quick"  # never to be taken for the real ones
    wait_for_closed_engines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jax.stages.Lowered, "compile", lambda self, given=None: compile_with(self, options | dict(given or {}))
        )
        patch.setattr(StepStore, "beside_jax_cache", lambda: StepStore(folder / "steps"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        flags = [f"--{name}={value}" for name, value in _QUICK.items()]
        patch.setenv("XLA_FLAGS", " ".join([os.environ["XLA_FLAGS"], *flags]))
        yield
        wait_for_closed_engines()
