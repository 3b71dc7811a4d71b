"""Forms of a step that depend on the platform, all chosen here.

The same step can be written in several ways that give the same numbers and differ many times in speed, and each
platform's compiler has its own.  The choice is a fixed table, not a measurement at each start: the form decides how
results round, and an answer must not depend on what else ran on the machine at start-up.  It does not depend on the
degree of tensor parallelism either, because every degree must give the same bits.

What the compilers of TPUs and GPUs make of a form is shown by `nitsum-bench compile`, without the hardware.
"""

import dataclasses

import jax

from nitsum_jax.models.layers.matmul import MatmulChoice, MatmulForm

CompileOptions = tuple[tuple[str, str | bool], ...]

# From JAX 0.12 on XLA:CPU compiles a loop as one function if no library does a part of its work, and then it rounds
# differently.  Libraries do what is large, so for the loop over the pool it would depend on how much lies on a device.
_CPU_OPTIONS: CompileOptions = (
    (("xla_disable_hlo_passes", "small-while-loop-hoisting"),) if jax.__version_info__ >= (0, 12) else ()
)
_MXU_ROWS = 8  # fewer rows than a register of a TPU holds are multiplied on its vector unit


@dataclasses.dataclass(frozen=True)
class PoolForm:
    """How keys and values lie in the pool, and how they are read and written.

    Attributes:
      as_integers: bfloat16 is stored as uint16.  XLA:CPU widens whole bfloat16 operands of a scatter to float32, which
        would copy the pool; integers it leaves alone.  On a TPU taking integers apart is most of the attention's work.
      by_rows: a read takes pages of `[W, G/K A]`, and a write single rows of `[G/K A]`.  XLA:TPU copies the whole pool
        to read or write it in other views.  XLA:CPU copies it for these; it reads pages of `[W G/K A]`.
      chunk_tokens: old tokens that attention takes at a time.
    """

    as_integers: bool = True
    by_rows: bool = False
    chunk_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class StepForms:
    """The forms of a step.

    Attributes:
      pool: of the KV pool.
      matmul: of the matrix products.
      compile_options: for XLA, of each step.
    """

    pool: PoolForm = PoolForm()
    matmul: MatmulChoice = MatmulChoice()
    compile_options: CompileOptions = ()


def step_forms(platform: str, dtype: str) -> StepForms:
    """The forms for a platform ("cpu", "gpu" or "tpu") and a type of weights and KV.

    Those of the CPU are what benchmarks/engine/matmul_forms.py finds fastest, those of accelerators what copies least
    in docs/accelerators.md.
    """
    match platform:
        case "tpu":
            padded = MatmulChoice(MatmulForm.PADDED, MatmulForm.PADDED, least_rows=_MXU_ROWS)
            return StepForms(PoolForm(as_integers=False, by_rows=True), padded)
        case "gpu" | "cuda":
            # XLA would write the weights of all vshards in one array, in every step, to multiply them in one go.
            return StepForms(PoolForm(by_rows=True), compile_options=(("xla_gpu_dot_merger_threshold_mb", "0"),))
        case _ if dtype == "bfloat16":
            return StepForms(
                matmul=MatmulChoice(single=MatmulForm.PADDED, many=MatmulForm.DOT), compile_options=_CPU_OPTIONS
            )
    return StepForms(compile_options=_CPU_OPTIONS)
