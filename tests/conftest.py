"""One setting for every test: 8 emulated CPU devices and a JAX that forgives nothing.

All of it goes through environment variables, which JAX reads when it is imported.  So this file needs no JAX itself
(tests of the pure rooms stay fast), and servers and tools that tests start as processes run under the same rules.
"""

import logging
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import pytest

NUM_DEVICES = 8
# They go first, so that no process is left alone with one of them at the end.
_LONGEST = (
    "engine/test_smollm2_golden.py",
    "engine/step/test_program.py",
    "engine/switching/test_random_switches.py",
    "engine/batching/test_wide_prefill.py",
)
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files that take longest in front; all else stays as it is."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(_LONGEST))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes the compilation cache of this session."""
    folder = config.stash.get(_CACHE_OWNER, None)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def _root_logger_stays() -> Iterator[None]:
    """A tool that a test runs in this process may set the root logger up, for streams that end with the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
