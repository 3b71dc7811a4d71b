"""Prints nitsum_jax/sim/workloads/azure_2023.py: figures derived from the Azure traces of 2023.

Usage: python tools/azure_figures.py FOLDER > nitsum_jax/sim/workloads/azure_2023.py
FOLDER holds AzureLLMInferenceTrace_conv.csv and _code.csv, or azure_2023_conv.csv and azure_2023_code.csv.
"""

import pathlib
import sys
import textwrap
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

from nitsum_jax.sim.workloads.synthetic import ModulatedArrivals
from nitsum_jax.sim.workloads.traces import read_trace
from nitsum_jax.sim.workloads.workload import Workload, index_of_dispersion

NAMES = {
    "conv": ("AzureLLMInferenceTrace_conv.csv", "azure_2023_conv.csv"),
    "code": ("AzureLLMInferenceTrace_code.csv", "azure_2023_code.csv"),
}
WINDOWS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0)
# Two time scales fit both traces; what a fit begins with.
GUESSES = {"conv": ((1.0, 0.05), (30.0, 0.05)), "code": ((1.0, 1.0), (20.0, 3.0))}
PROBABILITIES = (*(i / 100 for i in range(100)), 0.995, 0.999, 1.0)

HEAD = '''"""Figures of the Azure LLM inference traces of 2023, from which the stand-ins are drawn.

Source: Azure public dataset, LLM inference trace 2023 (conversation and code), CC-BY,
https://github.com/Azure/AzurePublicDataset.  Derived by tools/azure_figures.py: quantiles of the lengths at
PROBABILITIES, requests and seconds, the index of dispersion of the arrivals in WINDOWS_S, and the time scales of
ModulatedArrivals fitted to it.  Made by that tool; edit there.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class TraceFigures:
    """What is known of a trace.

    Attributes:
      requests: how many.
      seconds: over so long a time.
      mean_prompt, mean_output: tokens.
      prompt, output: quantiles at PROBABILITIES, tokens.
      dispersion: index of dispersion of the arrivals at WINDOWS_S.
      scales: (seconds, variance) of a ModulatedArrivals like it.
    """

    requests: int
    seconds: float
    mean_prompt: float
    mean_output: float
    prompt: tuple[float, ...]
    output: tuple[float, ...]
    dispersion: tuple[float, ...]
    scales: tuple[tuple[float, float], ...]

'''


def fitted_scales(dispersion: Sequence[float], rate: float, guess: Sequence[tuple[float, float]]) -> np.ndarray:
    """Time scales and variances, `[scales, 2]`, whose index of dispersion comes nearest, in logarithms."""

    def errors(x: np.ndarray) -> list[float]:
        scales = tuple((float(t), float(v)) for t, v in np.exp(x).reshape(-1, 2))
        arrivals = ModulatedArrivals(scales)
        return [np.log(arrivals.expected_dispersion(rate, w) / d) for w, d in zip(WINDOWS_S, dispersion, strict=True)]

    return np.exp(least_squares(errors, np.log(guess).ravel()).x).reshape(-1, 2)


def figures(workload: Workload, guess: Sequence[tuple[float, float]]) -> str:
    """The figures as an expression."""
    prompt = [r.prompt_tokens for r in workload.requests]
    output = [r.output_tokens for r in workload.requests]
    dispersion = [index_of_dispersion(workload.arrivals(), workload.seconds, w) for w in WINDOWS_S]
    scales = fitted_scales(dispersion, workload.rate, guess)
    fields = {
        "requests": len(workload),
        "seconds": round(workload.seconds, 1),
        "mean_prompt": round(float(np.mean(prompt)), 2),
        "mean_output": round(float(np.mean(output)), 2),
        "prompt": tuple(np.round(np.quantile(prompt, PROBABILITIES), 1).tolist()),
        "output": tuple(np.round(np.quantile(output, PROBABILITIES), 1).tolist()),
        "dispersion": tuple(round(d, 2) for d in dispersion),
        "scales": tuple((float(f"{t:.3g}"), float(f"{v:.3g}")) for t, v in scales),
    }
    return "TraceFigures(\n" + "".join(f"{_wrapped(f'{k}={v!r}')},\n" for k, v in fields.items()) + ")"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, initial_indent="    ", subsequent_indent="        ", break_long_words=False)


def main(folder: pathlib.Path) -> None:
    """Prints the module."""
    print(HEAD)
    print("PROBABILITIES = (*(i / 100 for i in range(100)), 0.995, 0.999, 1.0)\n")
    print(f"WINDOWS_S = {WINDOWS_S!r}\n\n# fmt: off")
    parts = []
    for name, files in NAMES.items():
        path = next((folder / f for f in files if (folder / f).exists()), folder / files[0])
        parts.append(f"{name.upper()} = {figures(read_trace(path, name).workload, GUESSES[name])}\n")
    print("\n".join(parts), end="")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
