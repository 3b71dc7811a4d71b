"""What is timed, the most telling first."""

import dataclasses
from collections.abc import Iterator

from nitsum_jax.bench.gpu_check import shapes
from nitsum_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TimedShape:
    """One step to be timed.

    Attributes:
      config: the model, of which a few layers are timed.
      tp: what one of so many devices computes.
      vshards: K.
      batch: sequences.
      tokens: new tokens of each; 1 is a decode step.
      context: tokens of each in the cache.
      attention: "auto" or "xla".
    """

    config: ModelConfig
    tp: int
    vshards: int
    batch: int
    tokens: int
    context: int
    attention: str = "auto"

    @property
    def what(self) -> str:
        """The kind of step."""
        return "decode" if self.tokens == 1 else "prefill"

    @property
    def name(self) -> str:
        """Unique in a plan."""
        by_xla = ", attention by XLA" if self.attention == "xla" else ""
        step = f"{self.what} of {self.config.name}, batch {self.batch} x {self.tokens} behind {self.context}"
        return f"{step}, TP {self.tp}, K={self.vshards}{by_xla}"


@dataclasses.dataclass(frozen=True)
class CheckPlan:
    """What is timed.

    Attributes:
      models: the first of them in every way, the others in decode and prefill steps at TP 1.
      depths: two numbers of layers; the time of all is extrapolated, for a step is linear in them.
      batches: of decode steps.
      telling: batches of those that are timed in further ways.
      context: tokens in the cache of a decode step.
      chunks: tokens of prefill steps.
      vshards: K beside 1.
      slices: TPs beside 1.
    """

    models: tuple[ModelConfig, ...]
    depths: tuple[int, int]
    batches: tuple[int, ...]
    telling: tuple[int, ...]
    context: int
    chunks: tuple[int, ...]
    vshards: tuple[int, ...]
    slices: tuple[int, ...]

    def timings(self, *, kernel: bool) -> Iterator[TimedShape]:
        """All steps; where a kernel attends, some of them with XLA's attention as well."""
        first = self.models[0]
        yield from (TimedShape(first, 1, 1, batch, 1, self.context) for batch in self.batches)
        yield from (TimedShape(first, 1, 1, 1, chunk, 0) for chunk in self.chunks)
        if kernel:
            yield from (TimedShape(first, 1, 1, batch, 1, self.context, "xla") for batch in self.telling)
            yield TimedShape(first, 1, 1, 1, self.chunks[-1], 0, "xla")
        yield from (TimedShape(first, 1, k, batch, 1, self.context) for k in self.vshards for batch in self.telling)
        yield from (TimedShape(first, tp, 1, batch, 1, self.context) for tp in self.slices for batch in self.telling)
        for config in self.models[1:]:
            yield from (TimedShape(config, 1, 1, batch, 1, self.context) for batch in self.batches)
            yield from (TimedShape(config, 1, 1, 1, chunk, 0) for chunk in self.chunks)


FULL = CheckPlan(
    models=(shapes.LLAMA_8B, shapes.QWEN_32B),
    depths=(1, 3),
    batches=(1, 8, 32, 64, 128, 256),
    telling=(1, 32),
    context=2048,
    chunks=(128, 512, 2048),
    vshards=(2, 4, 8),
    slices=(2, 4, 8),
)
QUICK = CheckPlan(
    models=(shapes.TINY,),
    depths=(1, 2),
    batches=(4,),
    telling=(4,),
    context=64,
    chunks=(32,),
    vshards=(2,),
    slices=(2,),
)
