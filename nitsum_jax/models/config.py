"""What a checkpoint says about its model: one frozen `ModelConfig`.

`config_hf` and `config_gguf` read it from the metadata of a checkpoint.
"""

import dataclasses

import numpy as np

from nitsum_jax.errors import InvalidInputError

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 scaling of the rotary frequencies.

    A frequency f with wavelength w = 2 pi / f becomes f / factor where w > original_max_context / low_freq_factor,
    stays f where w < original_max_context / high_freq_factor, and is interpolated in between with
    s = (original_max_context / w - low_freq_factor) / (high_freq_factor - low_freq_factor):
    (1 - s) * f / factor + s * f.  Clipping s to [0, 1] gives all three cases at once.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_context: int

    @classmethod
    def linear(cls, factor: float, max_context: int) -> "RopeScaling":
        """Plain division of all frequencies by `factor`, in the Llama-3 form.

        Exact: no wavelength is under 2 pi, and these bounds put "scaled in full" at every wavelength over 1.
        """
        return cls(factor, float(max_context), 2.0 * max_context, max_context)

    @property
    def is_linear(self) -> bool:
        """True if made by `linear`: every frequency is divided by the factor."""
        return self == RopeScaling.linear(self.factor, self.original_max_context)

    def divisors(self, head_dim: int, theta: float) -> np.ndarray:
        """What each rotary frequency is divided by: [A/2], float64."""
        frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        turns = self.original_max_context * frequency / (2.0 * np.pi)  # over the original context
        s = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return np.asarray(1.0 / ((1.0 - s) / self.factor + s))


@dataclasses.dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and arithmetic of a decoder model.

    Attributes:
      name: for people; never decides anything.
      architecture: `model_type` of its family, see `families`.
      num_layers: L.
      d_model: D.
      d_mlp: F.
      num_heads: H, query heads.
      num_kv_heads: G, divides H.
      head_dim: A, even.
      vocab_size: V, rows of the embedding table (the tokenizer may use fewer).
      max_context: positions the model was trained for, in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: None for plain RoPE.
      norm_eps: added to the mean square in RMSNorm.
      tied_head: the embedding table is also the output head.
      qkv_bias: q, k and v have a bias (Qwen2).
      qk_norm: RMSNorm over A on q and k before RoPE (Qwen3).
      eos_ids: tokens that end a generation.
      bos_id: token that starts a text, if the model has one.
      dtype: of the checkpoint, one of DTYPES (quantised GGUF counts as float32, what it dequantises to).
    """

    name: str
    architecture: str
    num_layers: int
    d_model: int
    d_mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises InvalidInputError if the numbers cannot belong to a model."""
        sizes = "num_layers d_model d_mlp num_heads num_kv_heads head_dim vocab_size max_context"
        for field in sizes.split():
            if getattr(self, field) < 1:
                raise InvalidInputError(f"model config has {field}={getattr(self, field)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InvalidInputError(
                f"model config has {self.num_heads} query heads, not a multiple of its {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise InvalidInputError(f"model config has head width {self.head_dim}; rotary embedding needs an even one")
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"checkpoint dtype '{self.dtype}' is not supported; use {', '.join(DTYPES)}")
