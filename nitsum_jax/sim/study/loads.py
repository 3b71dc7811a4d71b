"""Loads: workloads at every rate, made of phases.

A steady mix is one phase.  In a shifting mix every phase has its own rates and lengths; a rate factor multiplies the
rates of all.  A part of a phase is the piece of its trace at the same time (a trace that ends is begun again),
brought to the part's mean rate: bursts within a phase are those of the trace, the rates of phases are those of the
config.  Pieces with less than a third of their trace's mean rate are passed over.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study.config_file import check_positive
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload, concatenate, mix, retier, scale_rate, window

_LEAST_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Requests of one tier in a phase.

    Attributes:
      trace: name of the trace that they are taken from.
      tier: their tier.
      rate: requests a second at factor 1.
      prompt_scale: what prompts are multiplied with.
      output_scale: what outputs are multiplied with.
    """

    trace: str
    tier: str
    rate: float
    prompt_scale: float = 1.0
    output_scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class LoadPhase:
    """A stretch of time with one mix; `seconds` long."""

    seconds: float
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        check_positive(seconds=self.seconds)


@dataclasses.dataclass(frozen=True)
class Load:
    """A workload at every rate.

    Attributes:
      name: what tables call it.
      traces: workloads by name, of any tier.
      phases: in order.
      seed: of what is random in changing rates.
      start_s: where in the traces it begins.
    """

    name: str
    traces: Mapping[str, Workload] = dataclasses.field(repr=False)
    phases: tuple[LoadPhase, ...]
    seed: int = 0
    start_s: float = 0.0

    def __post_init__(self) -> None:
        for name in {part.trace: None for phase in self.phases for part in phase.parts}:
            if name not in self.traces:
                known = ", ".join(self.traces)
                raise InvalidInputError(f"load {self.name}: unknown trace {name!r}: use one of {known}")

    @property
    def seconds(self) -> float:
        """Its length."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def rate(self) -> float:
        """Mean requests a second at factor 1."""
        return sum(phase.seconds * sum(part.rate for part in phase.parts) for phase in self.phases) / self.seconds

    def at(self, factor: float) -> Workload:
        """The workload at a factor of its rate; requests of a lower factor are also among those of a higher one."""
        phases = []
        start = self.start_s
        for phase in self.phases:
            parts = [self._part(part, start, phase.seconds, factor) for part in phase.parts if part.rate > 0]
            empty = Workload((), self.name, phase.seconds)
            phases.append(mix([empty, *parts]))
            start += phase.seconds
        return concatenate(phases, self.name)

    def _part(self, part: Part, start: float, seconds: float, factor: float) -> Workload:
        trace = self.traces[part.trace]
        piece = _cut(trace, start, seconds)
        for _ in range(math.ceil(trace.seconds / seconds)):  # traces have minutes with hardly any request
            if piece.rate >= _LEAST_SHARE * trace.rate:
                break
            start += seconds
            piece = _cut(trace, start, seconds)
        scaled = scale_rate(piece, factor * part.rate / piece.rate, self.seed)
        if part.prompt_scale != 1 or part.output_scale != 1:
            scaled = _lengths(scaled, part.prompt_scale, part.output_scale)
        return retier(scaled, part.tier)


def _cut(trace: Workload, start: float, seconds: float) -> Workload:
    """A piece of a trace that is repeated for ever."""
    pieces = []
    at = start % trace.seconds
    left = seconds
    while left > 1e-9:
        piece = window(trace, at, min(left, trace.seconds - at))
        pieces.append(piece)
        left -= piece.seconds
        at = 0.0
    whole = concatenate(pieces, trace.name)
    return whole if math.isclose(whole.seconds, seconds, abs_tol=1e-12) else dataclasses.replace(whole, seconds=seconds)


def _lengths(workload: Workload, prompt: float, output: float) -> Workload:
    scaled = (
        TraceRequest(
            r.arrival_s, max(1, round(r.prompt_tokens * prompt)), max(1, round(r.output_tokens * output)), r.tier
        )
        for r in workload.requests
    )
    return dataclasses.replace(workload, requests=tuple(scaled))


def cached(load: Load, size: int = 24) -> "functools._lru_cache_wrapper[Workload]":
    """`load.at` that remembers its last answers."""
    return functools.lru_cache(maxsize=size)(load.at)


def steady(name: str, traces: Mapping[str, Workload], parts: Sequence[Part], seconds: float, seed: int = 0) -> Load:
    """A load of one phase."""
    return Load(name, traces, (LoadPhase(seconds, tuple(parts)),), seed)
