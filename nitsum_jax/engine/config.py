"""The settings of an engine."""

import dataclasses
import pathlib

from nitsum_jax.engine.batching.pacing import Pace
from nitsum_jax.engine.step.attention import KV_DTYPES
from nitsum_jax.engine.step.forms import ATTENTIONS, FUSED_STEPS, fuses
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.quantisation import check_quantization
from nitsum_jax.models.pooling import POOLINGS

REDUCTIONS = ("fixed", "fast")
_DTYPES = ("auto", "float32", "bfloat16")
_DECODE_BUCKETS = (1, 8, 32, 128)
_PREFILL_BUCKET = 32
# Of a mixed step's decoding rows.  Sums over devices want multiples of the largest TP, and more buckets would save
# little: beside the tokens of a chunk the padding of some rows is not much.
_BESIDE_BUCKET, _BESIDE_MULTIPLE = 32, 8


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine; None means that the engine chooses, as described.

    Attributes:
      devices: N, number of devices of the cell; None: all.
      layout: text form of the first layout; None: as many instances as possible, of one device each or of the least TP
        at which the weights fit.
      vshards: K, number of virtual shards; None: the largest power of two that is at most N.
      dtype: type of weights: "float32", "bfloat16", or "auto" (bfloat16 if the hardware multiplies it).
      kv_dtype: type of the KV cache: "float32", "bfloat16", "int8" (with a scale per token and head; not on TPUs) or
        "float8_e4m3" (both take half of bfloat16's bytes, for twice the context and half of what a switch moves), or
        "auto" (that of the weights).
      quantization: which weights are kept in few bits: "none" (they are widened to `dtype`), "auto" (what the
        checkpoint has in few bits stays in them), "int8" or "int4" (see `models.checkpoint.quantisation`).
      max_model_len: longest prompt and output together, tokens; None: what the model was trained for.
      max_batch: most sequences of an instance at a time.
      page_size: W, tokens per KV block, a power of two up to 128.
      prefill_chunk: most prompt tokens in one step.
      kv_cache_gib: size of the KV pool of each device, GiB; None: by the memory plan.
      deterministic: one bucket per phase, so that neither load nor a switch can change a token.
      max_queue: most requests that may wait; further ones are refused.
      layouts: allow-list of layouts; None: all layouts of the cell.
      wide_prefill_tokens: prompts of at least this many tokens are prefilled at the widest TP of the cell, between the
        decode steps of the instances on the same devices; None: never.
      residency: which weights stay on the devices: "resident", "lean" or "auto" (see docs/switching.md).
      weight_budget_gib: weights that may stay on a device, GiB, for residency "auto"; None: as much as fits.
      precopy: copy KV blocks ahead of a switch while the sequences still decode.
      prefix_cache: whether prompts that begin alike share KV blocks; None: yes, unless deterministic.  In deterministic
        mode they are shared in whole prefill chunks.
      drain_before_switch: whether a switch waits until the steps in flight have been read, or launches its copies
        behind them; None: it waits on a CPU, where a launch waits anyway.
      attention: what attends to the KV pool: "xla" (plain operations), "pallas" (a kernel; GPUs and TPUs only) or
        "auto" (a kernel on accelerators that have one for the model's shapes).
      reduction: how partial results of devices are added up: "fixed" (in one order: the same bits at every TP) or
        "fast" (fewer and smaller messages in bfloat16, no promise about bits).
      fused_steps: whether a prompt's chunk and the sequences that decode share a step: "on", "off" or "auto" (on
        accelerators, and in a paced cell if its target does that).  Never in deterministic mode, where all steps of a
        phase have one shape.
      pooling: what a prompt's embedding is made of, for requests that want one: "last" (token), "mean" (of all tokens),
        "none" (there are no embeddings) or "auto" (as the model's files say, if they do).
      tps: the TPs that layouts may have, of those that fit; None: all.
      tier_names: tiers that requests may name.
      pace: delivers results at the pace of other hardware (see `engine.batching.pacing`); None: without delay.
    """

    devices: int | None = None
    layout: str | None = None
    vshards: int | None = None
    dtype: str = "auto"
    kv_dtype: str = "auto"
    quantization: str = "none"
    max_model_len: int | None = None
    max_batch: int = 32
    page_size: int = 16
    prefill_chunk: int = 128
    kv_cache_gib: float | None = None
    deterministic: bool = False
    max_queue: int = 256
    layouts: tuple[str, ...] | None = None
    wide_prefill_tokens: int | None = None
    residency: str = "auto"
    weight_budget_gib: float | None = None
    precopy: bool = False
    prefix_cache: bool | None = None
    drain_before_switch: bool | None = None
    attention: str = "auto"
    reduction: str = "fixed"
    fused_steps: str = "auto"
    pooling: str = "auto"
    tps: tuple[int, ...] | None = None
    tier_names: tuple[str, ...] = ("interactive", "standard", "batch")
    pace: Pace | None = None

    def __post_init__(self) -> None:
        """Raises InvalidInputError for a value outside its range."""
        if self.dtype not in _DTYPES:
            raise InvalidInputError(f"dtype={self.dtype} is not known: give one of {', '.join(_DTYPES)}")
        if self.kv_dtype not in ("auto", *KV_DTYPES):
            known = ", ".join(("auto", *KV_DTYPES))
            raise InvalidInputError(f"kv_dtype={self.kv_dtype} is not known: give one of {known}")
        check_quantization(self.quantization)
        if self.attention not in ATTENTIONS:
            raise InvalidInputError(f"attention={self.attention} is not known: give one of {', '.join(ATTENTIONS)}")
        if self.reduction not in REDUCTIONS:
            raise InvalidInputError(f"reduction={self.reduction} is not known: give one of {', '.join(REDUCTIONS)}")
        if self.pooling not in POOLINGS:
            raise InvalidInputError(f"pooling={self.pooling} is not known: give one of {', '.join(POOLINGS)}")
        if self.deterministic and self.reduction == "fast":
            raise InvalidInputError(
                "reduction=fast cannot go with deterministic mode, where no switch may change a token: leave one out"
            )
        if self.fused_steps not in FUSED_STEPS:
            known = ", ".join(FUSED_STEPS)
            raise InvalidInputError(f"fused_steps={self.fused_steps} is not known: give one of {known}")
        if self.deterministic and self.fused_steps == "on":
            raise InvalidInputError(
                "fused_steps=on cannot go with deterministic mode, where all steps of a phase have one shape: leave "
                "one out"
            )
        if not 1 <= self.page_size <= 128 or self.page_size & (self.page_size - 1):
            raise InvalidInputError(f"page_size={self.page_size} must be a power of two from 1 to 128")
        for name in (
            "devices",
            "vshards",
            "max_model_len",
            "max_batch",
            "prefill_chunk",
            "max_queue",
            "wide_prefill_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name}={value} must be at least 1")
        if self.prefill_chunk < 2:
            raise InvalidInputError("prefill_chunk=1 must be at least 2")
        if self.prefix_cache and self.deterministic and self.prefill_chunk % self.page_size:
            raise InvalidInputError(
                f"prefill_chunk={self.prefill_chunk} is not a multiple of page_size={self.page_size}, as prefix_cache "
                "needs in deterministic mode: change one of them"
            )
        if self.kv_cache_gib is not None and not self.kv_cache_gib > 0:
            raise InvalidInputError(f"kv_cache_gib={self.kv_cache_gib} must be positive")

    def num_vshards(self, devices: int) -> int:
        """K of a cell of so many devices: as asked for, or the largest TP that it can have."""
        return self.vshards or 1 << (devices.bit_length() - 1)

    def decode_shapes(self) -> tuple[StepShape, ...]:
        """Buckets of decode steps, smallest first."""
        smaller = () if self.deterministic else tuple(size for size in _DECODE_BUCKETS if size < self.max_batch)
        return tuple(StepShape(size, 1) for size in (*smaller, self.max_batch))

    def prefill_shapes(self) -> tuple[StepShape, ...]:
        """Buckets of prefill steps, smallest first: one sequence at a time."""
        small = not self.deterministic and self.prefill_chunk >= 2 * _PREFILL_BUCKET
        sizes = (_PREFILL_BUCKET, self.prefill_chunk) if small else (self.prefill_chunk,)
        return tuple(StepShape(1, size) for size in sizes)

    def fuses(self, platform: str) -> bool:
        """Whether there are mixed steps on a platform ("cpu", "gpu", "tpu")."""
        return not self.deterministic and fuses(platform, self.fused_steps)

    def mixed_shapes(self) -> tuple[StepShape, ...]:
        """Buckets of mixed steps, where there are any: each of a prefill step with one or two sizes of a batch."""
        most = -(-self.max_batch // _BESIDE_MULTIPLE) * _BESIDE_MULTIPLE
        sizes = (_BESIDE_BUCKET, most) if most > _BESIDE_BUCKET else (most,)
        return tuple(StepShape(1, prefill.tokens, size) for prefill in self.prefill_shapes() for size in sizes)


def prefix_granule(config: EngineConfig) -> int | None:
    """Tokens in multiples of which prompts share KV blocks; None: they do not."""
    if not (not config.deterministic if config.prefix_cache is None else config.prefix_cache):
        return None
    return config.prefill_shapes()[-1].tokens if config.deterministic else config.page_size


def resolve_dtype(name: str, platform: str) -> str:
    """What "auto" means on a platform ("cpu", "gpu", "tpu").

    On a CPU bfloat16 halves the bytes of a step, but only with instructions for it is the product fast: without them
    it is many times slower than float32.
    """
    if name != "auto":
        return name
    if platform != "cpu":
        return "bfloat16"
    try:
        flags = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"
