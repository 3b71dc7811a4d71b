"""The load of the demonstration: kinds of requests and lengths of prompts and outputs shift from phase to phase."""

import dataclasses

from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.sim.workloads.schedules import constant
from nitsum_jax.sim.workloads.stand_ins import stand_in_stream
from nitsum_jax.sim.workloads.synthetic import PoissonArrivals, generate
from nitsum_jax.sim.workloads.workload import Workload, concatenate

TIERS = TierSet((Tier("chat", 500, 12), Tier("code", 10000, 200)))


@dataclasses.dataclass(frozen=True, slots=True)
class DemoPhase:
    """A stretch of time with one mix.

    Attributes:
      name: for people.
      chat, code: requests per second.
      prompt, output: what lengths of code requests are multiplied with.
    """

    name: str
    chat: float
    code: float
    prompt: float = 1.0
    output: float = 1.0


# About four fifths of what the best layout of each can serve at the pace of qwen2.5-32b-h100; no layout serves both.
PHASES = (
    DemoPhase("chat-heavy", 19.0, 0.6),
    DemoPhase("code-heavy", 0.9, 27.0, prompt=1.5),
    DemoPhase("chat-heavy again", 19.0, 0.6),
    DemoPhase("code-heavy again", 0.9, 27.0, prompt=1.5),
)


def demo_load(phase_s: float, rate_scale: float, seed: int, phases: tuple[DemoPhase, ...] = PHASES) -> Workload:
    """The workload: the lengths of the Azure traces of 2023 (stand-ins), Poisson arrivals."""
    parts = []
    for index, phase in enumerate(phases):
        streams = []
        for trace, tier, rate in (("azure-conv-like", "chat", phase.chat), ("azure-code-like", "code", phase.code)):
            stream = dataclasses.replace(
                stand_in_stream(trace, tier), rate=constant(rate * rate_scale), arrivals=PoissonArrivals()
            )
            if tier == "code":
                stream = dataclasses.replace(
                    stream, prompt_scale=constant(phase.prompt), output_scale=constant(phase.output)
                )
            streams.append(stream)
        parts.append(generate(streams, phase_s, seed * 1000 + index, phase.name))
    return concatenate(parts, "demo")
