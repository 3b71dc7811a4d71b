"""Forms of a step that depend on the platform, all chosen here.

The same step can be written in several ways that give the same numbers and differ many times in speed, and each
platform's compiler has its own.  The choice is a fixed table, not a measurement at each start: the form decides how
results round, and an answer must not depend on what else ran on the machine at start-up.  It does not depend on the
degree of tensor parallelism either, because every degree must give the same bits.

What the compilers of TPUs and GPUs make of a form is shown by `nitsum-bench compile`, without the hardware.
"""

import dataclasses
import enum

import jax

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.layers.matmul import MatmulChoice, MatmulForm
from nitsum_jax.models.layers.reduction import GATHER_LIMIT_BYTES

CompileOptions = tuple[tuple[str, str | bool], ...]

# From JAX 0.12 on XLA:CPU compiles a loop as one function if no library does a part of its work, and then it rounds
# differently.  Libraries do what is large, so for the loop over the pool it would depend on how much lies on a device.
_CPU_OPTIONS: CompileOptions = (
    (("xla_disable_hlo_passes", "small-while-loop-hoisting"),) if jax.__version_info__ >= (0, 12) else ()
)


@dataclasses.dataclass(frozen=True)
class PoolForm:
    """How keys and values lie in the pool, and how they are read and written.

    Attributes:
      as_integers: bfloat16 is stored as uint16.  XLA:CPU widens whole bfloat16 operands of a scatter to float32, which
        would copy the pool; integers it leaves alone.  On a TPU taking integers apart is most of the attention's work.
      by_rows: a read takes pages of `[W, G/K A]`, and a write single rows of `[G/K A]`.  XLA:TPU copies the whole pool
        to read or write it in other views.  XLA:CPU copies it for these; it reads pages of `[W G/K A]`, and lays a
        single new token among what it has read.
      chunk_tokens: old tokens that attention takes at a time.
    """

    as_integers: bool = True
    by_rows: bool = False
    chunk_tokens: int = 128


class AttentionForm(enum.StrEnum):
    """What attends to the pool.

    XLA: a loop of plain operations; the reference.
    MOSAIC: a kernel for TPUs.
    TRITON: a kernel for GPUs.
    INTERPRETED: the kernel for TPUs, step by step on a CPU: very slow, for tests.
    """

    XLA = "xla"
    MOSAIC = "mosaic"
    TRITON = "triton"
    INTERPRETED = "interpreted"


@dataclasses.dataclass(frozen=True)
class StepForms:
    """The forms of a step.

    Attributes:
      pool: of the KV pool.
      matmul: of the matrix products.
      attention: what attends.
      gather_limit_bytes: partial results up to this size are fetched whole by every device, see `Ranks`.
      compile_options: for XLA, of each step.
    """

    pool: PoolForm = PoolForm()
    matmul: MatmulChoice = MatmulChoice()
    attention: AttentionForm = AttentionForm.XLA
    gather_limit_bytes: int = GATHER_LIMIT_BYTES
    compile_options: CompileOptions = ()


ATTENTIONS = ("auto", "xla", "pallas")
FUSED_STEPS = ("auto", "on", "off")
_KERNELS = {"tpu": AttentionForm.MOSAIC, "gpu": AttentionForm.TRITON}
# What a link carries in the time of about one more round of messages.
_LINK_LIMIT_BYTES = 1 << 17
_MXU_ROWS = 8  # fewer rows than a register of a TPU holds are multiplied on its vector unit
# XLA:GPU multiplies a single row with every weight, number by number, and writes the products out.
_TENSOR_CORE_ROWS = 16


def step_forms(platform: str, dtype: str, attention: str = "auto") -> StepForms:
    """The forms for a platform and a type of weights and KV.

    Those of the CPU are what benchmarks/engine/matmul_forms.py finds fastest, those of accelerators what copies least
    in docs/accelerators.md.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: "float32" or "bfloat16".
      attention: "xla", "pallas" (a kernel) or "auto" (a kernel on accelerators).
    """
    forms = _forms(platform, dtype)
    if attention == "xla" or (attention == "auto" and platform == "cpu"):
        return forms
    return dataclasses.replace(forms, attention=_KERNELS.get(platform, AttentionForm.INTERPRETED))


def check_kv_dtype(platform: str, kv_dtype: str) -> None:
    """Refuses a type of the KV cache that a platform cannot keep in place.

    Raises:
      InvalidInputError: it is one.
    """
    if platform == "tpu" and kv_dtype == "int8":
        raise InvalidInputError(
            "kv_dtype=int8 would be copied whole in every step on a TPU, whose tiles have no room for scales: give "
            "float8_e4m3"
        )


def fuses(platform: str, asked: str = "auto") -> bool:
    """Whether a prompt's chunk and the sequences that decode share a step, so that weights are read once for both.

    On accelerators that is what their compilers find faster (docs/accelerators.md).  On a CPU both are bound by
    arithmetic, and measured it makes no difference; so it does without the executables (docs/inside/step.md).

    Args:
      platform: "cpu", "gpu" or "tpu".
      asked: "on", "off" or "auto" (what is best there).
    """
    return platform != "cpu" if asked == "auto" else asked == "on"


def _forms(platform: str, dtype: str) -> StepForms:
    match platform:
        case "tpu":
            padded = MatmulChoice(MatmulForm.PADDED, MatmulForm.PADDED, least_rows=_MXU_ROWS)
            return StepForms(PoolForm(as_integers=False, by_rows=True), padded, gather_limit_bytes=_LINK_LIMIT_BYTES)
        case "gpu":
            # XLA would write the weights of all vshards in one array, in every step, to multiply them in one go.
            options: CompileOptions = (("xla_gpu_dot_merger_threshold_mb", "0"),)
            padded = MatmulChoice(MatmulForm.PADDED, MatmulForm.DOT, least_rows=_TENSOR_CORE_ROWS)
            return StepForms(
                PoolForm(by_rows=True), padded, gather_limit_bytes=_LINK_LIMIT_BYTES, compile_options=options
            )
        case _ if dtype == "bfloat16":
            return StepForms(
                matmul=MatmulChoice(single=MatmulForm.PADDED, many=MatmulForm.DOT), compile_options=_CPU_OPTIONS
            )
    return StepForms(compile_options=_CPU_OPTIONS)
