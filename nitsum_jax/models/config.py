"""What a checkpoint says about its model: one frozen `ModelConfig`.

`config_hf` and `config_gguf` read it from the metadata of a checkpoint.
"""

import dataclasses

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.layers.rope_scaling import AnyScaling, LongRopeScaling

ACTIVATIONS = ("silu", "gelu_tanh")
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionVariant:
    """What attention of a layer differs in.

    Attributes:
      window: a token sees so many tokens, itself among them; None: all before it.
      soft_cap: scores s become c tanh(s / c); None: they stay.
      scale: of the scores; None: A**-0.5.
    """

    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None

    def scale_of(self, head_dim: int) -> float:
        """What scores of heads of this width are multiplied by."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclasses.dataclass(frozen=True, slots=True)
class Rope:
    """How features of q and k turn with the position.

    Attributes:
      theta: base of the frequencies.
      scaling: of the frequencies, or None.
    """

    theta: float
    scaling: AnyScaling | None = None


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
      local_rope: of layers with a window, if they have another one (Gemma 3).
      rotary_dim: so many features of a head turn, the first ones; None: all (Phi-4-mini).
      rope_layers: which layers turn q and k at all; empty: all (SmolLM3).
      window: what a token sees in layers with a window, in tokens; None: no layer has one.
      windowed: which layers have the window; empty if none has.
      query_scale: of attention's scores; None: A**-0.5.
      attention_soft_cap: of attention's scores (Gemma 2); None: none.
      logit_soft_cap: of the logits (Gemma 2); None: none.
      activation: of the MLP's gate, one of ACTIVATIONS.
      norm_eps: added to the mean square in RMSNorm.
      norm_offset: added to the scale of every norm (Gemma: 1).
      pre_norms: attention and MLP begin with a norm.
      post_norms: they end with one, before they are added (Gemma, OLMo 2).
      tied_head: the embedding table is also the output head.
      qkv_bias: q, k and v have a bias (Qwen2).
      qk_norm: RMSNorm on q and k before RoPE, over each head (Qwen3).
      wide_qk_norm: that norm is over all heads together (OLMo 2).
      embedding_scale: embeddings are multiplied by it (Gemma, Granite).
      residual_scale: what attention and MLP give is multiplied by it (Granite).
      logit_scale: logits are multiplied by it (Granite).
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
    rope_scaling: AnyScaling | None = None
    local_rope: Rope | None = None
    rotary_dim: int | None = None
    rope_layers: tuple[bool, ...] = ()
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    activation: str = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    tied_head: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
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
        turning = self.rotary_width
        if turning % 2 or not 0 < turning <= self.head_dim:
            raise InvalidInputError(f"model config turns {turning} of {self.head_dim} features; give an even number")
        if isinstance(self.rope_scaling, LongRopeScaling):
            lengths = {len(self.rope_scaling.short), len(self.rope_scaling.long)}
            if lengths != {turning // 2}:
                raise InvalidInputError(f"model config has LongRoPE factors for {lengths} features, not {turning // 2}")
        if self.activation not in ACTIVATIONS:
            raise InvalidInputError(f"activation '{self.activation}' is not supported; use {', '.join(ACTIVATIONS)}")
        for what, layers in (("windowed", self.windowed), ("rope_layers", self.rope_layers)):
            if layers and len(layers) < self.num_layers:
                raise InvalidInputError(f"model config has {what} for {len(layers)} of {self.num_layers} layers")
        if (self.window is None) == any(self.windowed):
            raise InvalidInputError(f"model config has window={self.window} and says otherwise which layers have it")
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"checkpoint dtype '{self.dtype}' is not supported; use {', '.join(DTYPES)}")

    @property
    def rotary_width(self) -> int:
        """Features of a head that turn with the position."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def attention_of(self, layer: int) -> AttentionVariant:
        """What attention of a layer differs in."""
        window = self.window if self.windowed and self.windowed[layer] else None
        return AttentionVariant(window, self.attention_soft_cap, self.query_scale)

    def rope_of(self, layer: int) -> Rope | None:
        """How q and k of a layer turn, if they do."""
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        if self.local_rope is not None and self.windowed and self.windowed[layer]:
            return self.local_rope
        return Rope(self.rope_theta, self.rope_scaling)

    @property
    def window_everywhere(self) -> int | None:
        """The window, if every layer has it: what lies before it is never read again."""
        return self.window if self.windowed and all(self.windowed[: self.num_layers]) else None

    def served_up_to(self, tokens: int) -> "ModelConfig":
        """The model for sequences of at most so many tokens: LongRoPE has other frequencies for long ones."""
        if not isinstance(self.rope_scaling, LongRopeScaling):
            return self
        return dataclasses.replace(self, rope_scaling=dataclasses.replace(self.rope_scaling, longest=tokens))
