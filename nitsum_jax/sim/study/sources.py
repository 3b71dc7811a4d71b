"""The traces that the study is made of: those of a folder, or what stands in for them."""

import pathlib
from collections.abc import Mapping

from nitsum_jax.sim.workloads.stand_ins import open_trace
from nitsum_jax.sim.workloads.traces import TraceFlag, read_trace
from nitsum_jax.sim.workloads.workload import Workload

FILES = {"conv": "azure_2023_conv.csv", "code": "azure_2023_code.csv"}
_STAND_INS = {"conv": "azure-conv-like", "code": "azure-code-like"}
_STUDY_S = 3600.0


def open_traces(folder: str | None, seed: int) -> tuple[Mapping[str, Workload], str]:
    """The traces by name, and what they are in words.

    Raises:
      InvalidInputError: the folder lacks one, or it is not sound.
    """
    if folder is None:
        opened = {
            name: open_trace(TraceFlag(name, source, None), seed=seed, seconds=_STUDY_S).workload
            for name, source in _STAND_INS.items()
        }
        return opened, f"synthetic stand-ins for the Azure traces of 2023, seed {seed}"
    found = {name: read_trace(pathlib.Path(folder) / file, name).workload for name, file in FILES.items()}
    return found, "Azure LLM inference traces of 2023, conversation and code"
