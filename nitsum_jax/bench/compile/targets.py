"""Accelerators that steps are compiled for, without having them.

JAX makes the devices of a topology from a description alone.  For TPUs libtpu is asked (`jax[tpu]`), for GPUs the CUDA
plugin (`jax[cuda12]`), which wants to be told what the chip can do.  Neither needs a device or a driver.

Rates are the makers' figures: v5e and v6e from Google Cloud's "TPU v5e" and "TPU v6e" pages, the H100 from NVIDIA's
data sheet (SXM, without sparsity).  The clocks of TPUs, with which the compiler's cycles become time, follow from
their arithmetic: v5e 4 units of 128 x 128, v6e 2 of 256 x 256 at twice the rate of operations per clock.
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from nitsum_jax.errors import InvalidInputError, PreconditionError

_GB = 10**9
_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do at most.

    Attributes:
      platform: "tpu" or "gpu".
      bytes_per_s: of its memory.
      flops_per_s: multiplications and additions in bfloat16.
      link_bytes_per_s: that it can send to its neighbours, one way.
      memory_bytes: that a program can use.
      clock_hz: of the compiler's cycles; None where the compiler estimates none.
    """

    platform: str
    bytes_per_s: float
    flops_per_s: float
    link_bytes_per_s: float
    memory_bytes: int
    clock_hz: float | None


CHIPS = {
    # 16 GB, of which libtpu gives programs 15.75 GiB; 4 links of 400 Gbit/s.
    "v5e": Chip("tpu", 819 * _GB, 197e12, 200 * _GB / 2, int(15.75 * 1024) * _MIB, 1.5e9),
    # 32 GB, of which 31.25 GiB; 4 links of 800 Gbit/s.
    "v6e": Chip("tpu", 1640 * _GB, 918e12, 448 * _GB / 2, int(31.25 * 1024) * _MIB, 1.75e9),
    # 80 GB; NVLink 900 GB/s, both ways together.
    "h100": Chip("gpu", 3350 * _GB, 989e12, 450 * _GB, 79 * 1024 * _MIB, None),
}

# For XLA:GPU, which knows no chip by name: the H100 SXM by NVIDIA's "Hopper tuning guide" and data sheet.
_H100 = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_block_optin": 227 << 10,
    "shared_memory_per_core": 228 << 10,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "memory_bandwidth": 3350 * _GB,
    "l2_cache_size": 50 << 20,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 80 * 1000**3,
    "registers_per_core_limit": 1 << 16,
    "registers_per_block_limit": 1 << 16,
}

# libtpu would otherwise ask the cloud's metadata server which machine it is on.
_NO_TPU_MACHINE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Some devices of one kind, as in `v5e:2x4` or `h100x8`."""

    name: str
    chip: Chip
    count: int

    @classmethod
    def parse(cls, name: str) -> "Target":
        """Reads the name of a target.

        Raises:
          InvalidInputError: it is none.
        """
        tpu = re.fullmatch(r"(v5e|v6e):(\d+)x(\d+)", name)
        gpu = re.fullmatch(r"(h100)x(\d+)", name)
        if tpu:
            return cls(name, CHIPS[tpu[1]], int(tpu[2]) * int(tpu[3]))
        if gpu:
            return cls(name, CHIPS[gpu[1]], int(gpu[2]))
        raise InvalidInputError(f"target '{name}' is not known: give one such as v5e:2x4, v6e:2x4 or h100x8")

    def devices(self) -> Sequence[jax.Device]:
        """The devices, for compiling only.

        Raises:
          PreconditionError: what JAX needs to compile for them is not installed.
        """
        if self.chip.platform == "tpu":
            for variable, value in _NO_TPU_MACHINE.items():
                os.environ.setdefault(variable, value)
            kind, options = "tpu", {}
        else:
            kind, options = "cuda", {"topology": f"1x1x{self.count}", "target_config": gpu_description()}
        name = self.name if kind == "tpu" else options["topology"]
        try:
            found = topologies.get_topology_desc(platform=kind, topology_name=name, **options)
        except Exception as error:  # whatever is missing, and each release says it in another way
            extra = "tpu" if kind == "tpu" else "cuda12"
            text = " ".join(str(error).split())[:160]
            raise PreconditionError(
                f"JAX cannot compile for {self.name} here ({text}): install jax[{extra}] (pip install -e '.[{extra}]')"
            ) from None
        return tuple(found.devices)


def gpu_description() -> str:
    """An H100 as XLA's `GpuTargetConfigProto` in text form."""
    lines = [f"{name}: {value}" for name, value in _H100.items()]
    info = "\n".join([*lines, "cuda_compute_capability { major: 9 minor: 0 }"])
    return "\n".join(
        [
            f"gpu_device_info {{\n{info}\n}}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 patch: 0 }",
            'device_description_str: "NVIDIA H100 80GB HBM3"',
        ]
    )
