"""Small steps compiled for accelerators that are not there."""

import dataclasses
import functools
import importlib.util

import pytest

from nitsum_jax.bench.compile.steps import CompiledStep, StepCase, compile_case
from nitsum_jax.bench.compile.targets import Target
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.models.config import ModelConfig

# What JAX compiles with, and the extra of this package that installs it.
_COMPILERS = {"tpu": ("libtpu", "tpu"), "gpu": ("jax_plugins.xla_cuda12", "cuda12")}
# A weight is larger than any activation that is made of it; the pool is larger than everything else together, and than
# the scratch memory of a TPU, to which a small one is copied.
TWO_LAYERS = ModelConfig("two layers", "llama", 2, 1024, 4096, 16, 8, 128, 2048, 8192, dtype="bfloat16")
DECODE, SINGLE, PREFILL, MIXED = StepShape(32, 1), StepShape(1, 1), StepShape(1, 32), StepShape(1, 32, 32)
POOL_TOKENS = 1 << 18


@dataclasses.dataclass(frozen=True)
class Asked:
    """A step to compile."""

    target: str
    tp: int
    shape: StepShape
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    attention: str = "auto"
    fast_sums: bool = False
    pool_tokens: int = POOL_TOKENS

    def __str__(self) -> str:
        words = [
            self.target,
            f"tp{self.tp}",
            "decode" if self.shape.is_decode else "mixed" if self.shape.is_mixed else "prefill",
        ]
        words += ["single"] * (self.shape == SINGLE)
        words += [self.dtype] * (self.dtype != "bfloat16") + ["fast"] * self.fast_sums
        words += [f"kv-{self.kv_dtype}"] * (self.kv_dtype is not None)
        words += [self.attention] * (self.attention != "auto")
        return "-".join(words)

    @property
    def case(self) -> StepCase:
        """The step in the forms of its target."""
        target = Target.parse(self.target)
        return StepCase(
            target,
            dataclasses.replace(TWO_LAYERS, dtype=self.dtype),
            self.tp,
            self.shape,
            max_model_len=1024,
            pool_tokens=self.pool_tokens,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            attention=self.attention,
            fast_sums=self.fast_sums,
        )


def skip_without_compiler(target: str) -> None:
    """Skips a test where the compiler of its target is not installed."""
    module, extra = _COMPILERS[Target.parse(target).chip.platform]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        pytest.skip(f"{module} is not installed: pip install -e '.[{extra}]', or make test-accelerator")


@functools.cache
def compiled(asked: Asked) -> CompiledStep:
    """The step, compiled once per process."""
    return compile_case(asked.case)
