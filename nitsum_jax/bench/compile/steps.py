"""The project's own step, compiled for a target."""

import dataclasses
import math
import time

import jax
import numpy as np
from jax.sharding import Mesh

from nitsum_jax.bench.compile.targets import Target
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import CompileOptions, StepForms, step_forms
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.engine.step.program import Program, compile_step
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.meshes.vshards import is_power_of_two
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut

# Without a GPU the compiler can try nothing out, and its first choice for few rows is to cut a product in 16 and add up
# the parts, which is more traffic than the weights.  So the library's products stand for whatever would be chosen.
_UNTRIED: dict[str, CompileOptions] = {
    "gpu": (("xla_gpu_autotune_level", "0"), ("xla_gpu_enable_triton_gemm", False)),
    "tpu": (),
}


@dataclasses.dataclass(frozen=True)
class StepCase:
    """A step of a model on some devices of a target.

    Attributes:
      target: where.
      config: the model.
      tp: devices that run it.
      shape: its bucket.
      max_model_len: what a block table can hold, tokens.
      pool_tokens: of context that the pools of the step's devices hold together, per virtual shard.
      vshards: K.
      page_size: W.
      dtype: of weights.
      kv_dtype: of the KV cache; None: as weights.
      attention: "auto", "xla" or "pallas", see `step_forms`.
      forms: other forms than the target's; `attention` then does not count.
      fast_sums: sums over devices with fewer bytes, see `Ranks`.
    """

    target: Target
    config: ModelConfig
    tp: int
    shape: StepShape
    max_model_len: int
    pool_tokens: int
    vshards: int = 8
    page_size: int = 16
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    attention: str = "auto"
    forms: StepForms | None = None
    fast_sums: bool = False

    def __post_init__(self) -> None:
        """Raises InvalidInputError if there are fewer devices, or a number that must be a power of two is none."""
        for name, value in (("TP", self.tp), ("K", self.vshards), ("the page size", self.page_size)):
            if not is_power_of_two(value):
                raise InvalidInputError(f"{name} is {value} and must be a power of two: give 1, 2, 4, 8, ...")
        if self.tp > min(self.target.count, self.vshards):
            raise InvalidInputError(
                f"TP {self.tp} is more than the {self.target.count} devices of {self.target.name} or the "
                f"{self.vshards} virtual shards"
            )

    @property
    def program(self) -> Program:
        """What is compiled."""
        cut = ModelCut.of(self.config, self.vshards)
        forms = self.forms or step_forms(self.target.chip.platform, self.dtype, self.attention)
        blocks = -(-self.pool_tokens // self.page_size) * self.vshards // self.tp
        stored = self.kv_dtype or self.dtype
        pool = PoolShape(
            blocks, self.config.num_layers, self.page_size, cut.kv_heads, self.config.head_dim, stored, forms.pool
        )
        forms = fitting(forms, self.attention, pool, q_heads=cut.q_heads, most_new_tokens=self.shape.tokens)
        options = (*forms.compile_options, *_UNTRIED[self.target.chip.platform])
        return Program(
            self.config,
            cut,
            self.dtype,
            pool,
            max(self.shape.rows, 32),
            self.max_model_len,
            dataclasses.replace(forms, compile_options=options),
            self.fast_sums,
        )

    @property
    def pool_bytes(self) -> int:
        """Bytes of a device's pool."""
        pool = self.program.pool
        return pool.blocks * pool.block_bytes

    @property
    def weight_numbers(self) -> tuple[int, ...]:
        """Which arguments of the step are matrices."""
        _, modules = self.program.decoder(self.tp)
        return tuple(number for number, leaf in enumerate(jax.tree.leaves(modules)) if len(leaf.shape) > 1)

    @property
    def weight_sizes(self) -> tuple[int, ...]:
        """Bytes of each matrix on a device; norms and biases are none."""
        _, modules = self.program.decoder(self.tp)
        leaves = jax.tree.leaves(modules)
        return tuple(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if len(leaf.shape) > 1)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler made.

    Attributes:
      case: of what.
      text: the optimised HLO of one device's program.
      temp_bytes: memory that it needs beside arguments and results.
      alias_bytes: arguments that results take the place of.
      argument_bytes: of all arguments.
      seconds: that compiling took.
    """

    case: StepCase
    text: str
    temp_bytes: int
    alias_bytes: int
    argument_bytes: int
    seconds: float


def compile_case(case: StepCase) -> CompiledStep:
    """Compiles a step.

    Raises:
      PreconditionError: there is no compiler for the target.
      jax.errors.JaxRuntimeError: the step does not fit the memory of the target, for one.
    """
    devices = case.target.devices()[: case.tp]
    mesh = Mesh(np.array(devices), (TP_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    start = time.perf_counter()
    compiled = compile_step(case.program, case.shape, mesh)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    return CompiledStep(
        case,
        compiled.as_text() or "",
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.argument_size_in_bytes,
        seconds,
    )
