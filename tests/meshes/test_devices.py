"""Finding and emulating devices, and how much memory they say they have."""

import os
import pathlib
import subprocess
import sys
import types
from typing import Any, cast

import jax
import pytest

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes import memory
from nitsum_jax.meshes.devices import discover, emulate_cpu_devices, free_bytes


def run_fresh(code: str, **environment: str) -> str:
    """Runs code in a process whose JAX has not started and was not told a number of devices."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    imports = "from nitsum_jax.meshes.devices import discover, emulate_cpu_devices\n"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", imports + code],
        env=env | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_emulation_before_jax_starts() -> None:
    code = """
emulate_cpu_devices(2)
emulate_cpu_devices(3)  # nothing has started yet
print(len(discover()), len(discover(2)))
emulate_cpu_devices(3)  # is so already
try:
    emulate_cpu_devices(4)
except Exception as error:
    print(type(error).__name__, error)
"""
    counts, error = run_fresh(code, XLA_FLAGS="--xla_force_host_platform_device_count=5").splitlines()
    assert counts == "3 2"
    assert error.startswith(
        "PreconditionError JAX has already started with 3 CPU device(s), not 4: emulate devices before"
    )


def test_no_platform_is_a_clear_error() -> None:
    code = """
try:
    discover()
except Exception as error:
    print(type(error).__name__, error)
"""
    output = run_fresh(code, JAX_PLATFORMS="cuda")
    assert output.startswith("PreconditionError JAX finds no devices (")
    assert output.endswith("): check drivers and JAX_PLATFORMS\n")
    assert len(output.splitlines()) == 1


def test_discover_returns_the_first_devices() -> None:
    assert discover() == tuple(jax.devices())
    assert discover(3) == tuple(jax.devices()[:3])


def test_too_many_devices_are_refused() -> None:
    there = len(jax.devices())
    with pytest.raises(
        PreconditionError, match=rf"{there + 1} devices are needed, but there are {there} \(cpu\): use at"
    ):
        discover(there + 1)


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_device_is_refused(n: int) -> None:
    with pytest.raises(InvalidInputError, match="give 1 or more"):
        discover(n)
    with pytest.raises(InvalidInputError, match="give 1 or more"):
        emulate_cpu_devices(n)


def test_an_emulated_device_has_the_memory_of_the_machine() -> None:
    free = free_bytes(jax.devices()[0])
    assert free is not None
    assert 1 << 20 < free < 1 << 50


@pytest.mark.parametrize(
    ("stats", "free"),
    [
        ({"bytes_limit": 100, "bytes_in_use": 30}, 70),
        ({"bytes_limit": 100}, 100),
        ({"bytes_limit": 100, "bytes_in_use": 130}, 0),
        ({}, None),
        (None, None),
    ],
)
def test_memory_of_an_accelerator(stats: dict[str, int] | None, free: int | None) -> None:
    device = cast(Any, types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats))
    assert free_bytes(device) == free


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_free_memory_of_the_machine(tmp_path: pathlib.Path) -> None:
    meminfo = write(tmp_path / "meminfo", "MemTotal:  24684084 kB\nMemFree:  1 kB\nMemAvailable:   2000 kB\n")
    assert memory._machine_free_bytes(meminfo) == 2000 * 1024


def test_control_groups_of_version_2(tmp_path: pathlib.Path) -> None:
    own = write(tmp_path / "own", "0::/box/inner\n")
    write(tmp_path / "box/inner/memory.max", "max\n")
    assert memory._cgroup_free_bytes(tmp_path, own) is None
    write(tmp_path / "box/memory.max", "1000\n")  # the parent's limit holds
    write(tmp_path / "box/memory.current", "700\n")
    write(tmp_path / "box/memory.stat", "anon 500\ninactive_file 200\n")
    assert memory._cgroup_free_bytes(tmp_path, own) == 1000 - 700 + 200


def test_control_groups_of_version_1(tmp_path: pathlib.Path) -> None:
    own = write(tmp_path / "own", "8:pids:/x\n4:cpu,memory:/not/mounted\n0::/\n")
    write(tmp_path / "memory/memory.limit_in_bytes", "1000\n")  # a container sees its own group at the root
    write(tmp_path / "memory/memory.usage_in_bytes", "1300\n")
    write(tmp_path / "memory/memory.stat", "total_inactive_file 100\n")
    assert memory._cgroup_free_bytes(tmp_path, own) == 0


def test_no_control_groups(tmp_path: pathlib.Path) -> None:
    assert memory._cgroup_free_bytes(tmp_path, tmp_path / "none") is None
    assert memory._cgroup_free_bytes(tmp_path, write(tmp_path / "own", "0::/\n")) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept() -> None:
    # In a process of its own: the setting is for good.
    code = """
import resource, sys
import numpy as np
from nitsum_jax.meshes.memory import keep_freed_memory

def faults_of(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        np.ones(16 << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory() or sys.exit(77)
faults_of(2)
print(faults_of(20))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4096  # the pages of one of the twenty arrays
