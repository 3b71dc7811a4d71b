"""Synthetic stand-ins for traces that users may not have, and the one place that opens what a `--trace` flag names."""

from collections.abc import Mapping

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads import azure_2023
from nitsum_jax.sim.workloads.azure_2023 import TraceFigures
from nitsum_jax.sim.workloads.schedules import constant
from nitsum_jax.sim.workloads.synthetic import EmpiricalLengths, ModulatedArrivals, Stream, generate
from nitsum_jax.sim.workloads.traces import TraceFlag, TraceRead, read_trace

STAND_INS: Mapping[str, TraceFigures] = {"azure-conv-like": azure_2023.CONV, "azure-code-like": azure_2023.CODE}
"""Streams with the rate, burstiness and lengths of the Azure traces of 2023."""


def stand_in_stream(name: str, tier: str) -> Stream:
    """The stream of a stand-in, to be used as it is or changed with dataclasses.replace.

    Raises:
      InvalidInputError: there is none of this name.
    """
    figures = STAND_INS.get(name)
    if figures is None:
        raise InvalidInputError(f"unknown synthetic trace {name!r}: use one of {', '.join(STAND_INS)}")
    return Stream(
        tier,
        constant(figures.requests / figures.seconds),
        EmpiricalLengths(azure_2023.PROBABILITIES, figures.prompt),
        EmpiricalLengths(azure_2023.PROBABILITIES, figures.output),
        ModulatedArrivals(figures.scales),
    )


def open_trace(flag: TraceFlag, *, seed: int = 0, seconds: float | None = None) -> TraceRead:
    """Reads the file that the flag names, or draws the stand-in of that name.

    Args:
      flag: what to open.
      seed: of a stand-in, at least 0.
      seconds: length of a stand-in (the original's if left out), and how far a file is read; longer files are not cut
        exactly, `window` does that.

    Raises:
      InvalidInputError: the file, its content or the flag is wrong.
    """
    if flag.source not in STAND_INS:
        return read_trace(flag.source, flag.tier, flag.format, until_s=seconds)
    if flag.format is not None or flag.tier is None:
        raise InvalidInputError(f"{flag.source} is drawn, not read: name a tier and no format, as TIER:{flag.source}")
    stream = stand_in_stream(flag.source, flag.tier)
    length = STAND_INS[flag.source].seconds if seconds is None else seconds
    # A seed of its own for each name: two stand-ins of one run must not burst together.
    own = seed * len(STAND_INS) + list(STAND_INS).index(flag.source)
    return TraceRead(generate([stream], length, own, flag.source), skipped=0, raised=0)
