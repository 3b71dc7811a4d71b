"""What a checkpoint says about its model: one frozen `ModelConfig`, read from Hugging Face or GGUF metadata.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from nitsum_jax.errors import InvalidInputError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral files call themselves llama
DTYPES = ("float32", "bfloat16", "float16")
_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# The only frequency factors in published Llama 3 checkpoints; GGUF keeps the resulting tensor, not these numbers.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


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
      architecture: one of ARCHITECTURES.
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
        if self.architecture not in ARCHITECTURES:
            raise InvalidInputError(
                f"model architecture '{self.architecture}' is not supported; supported are {', '.join(ARCHITECTURES)}"
            )
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


def config_from_hf(config: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The config of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      name: for people; by default the `_name_or_path` of the file.

    Raises:
      InvalidInputError: a feature the decoder lacks, or a missing or impossible value; it names the feature or key.
    """
    with _readable("config.json"):
        return _config_from_hf(config, name)


def _config_from_hf(config: Mapping[str, Any], name: str) -> ModelConfig:
    architecture = str(config.get("model_type", "of unknown type"))
    if architecture not in ARCHITECTURES:
        raise _unsupported(f"model architecture '{architecture}'", ", ".join(ARCHITECTURES))
    _refuse_hf_features(config)
    d_model, num_heads = _hf_int(config, "hidden_size"), _hf_int(config, "num_attention_heads")
    max_context = _hf_int(config, "max_position_embeddings")
    rope = _hf_rope(config)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    eos = config.get("eos_token_id")
    bos = config.get("bos_token_id")
    return ModelConfig(
        name=name or str(config.get("_name_or_path", "")),
        architecture=architecture,
        num_layers=_hf_int(config, "num_hidden_layers"),
        d_model=d_model,
        d_mlp=_hf_int(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_hf_int(config, "num_key_value_heads", num_heads),
        head_dim=_hf_int(config, "head_dim", d_model // num_heads if num_heads > 0 else 0),
        vocab_size=_hf_int(config, "vocab_size"),
        max_context=max_context,
        rope_theta=float(theta),
        rope_scaling=_hf_rope_scaling(rope, max_context),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (int(eos),),
        bos_id=None if bos is None else int(bos[0] if isinstance(bos, list | tuple) else bos),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers and `config_from_hf` read back as the same model."""
    result: dict[str, Any] = {
        "_name_or_path": config.name,
        "architectures": [_HF_CLASSES[config.architecture]],
        "model_type": config.architecture,
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "eos_token_id": list(config.eos_ids) if len(config.eos_ids) != 1 else config.eos_ids[0],
        "bos_token_id": config.bos_id,
        "torch_dtype": config.dtype,
    }
    if config.architecture == "mistral":
        result["sliding_window"] = None  # transformers' own default is a window of 4096
    if config.rope_scaling is not None:
        result["rope_scaling"] = _rope_scaling_to_hf(config.rope_scaling)
    return result


class GgufReader(Protocol):
    """What is needed of an open GGUF file; `GgufFile` of this package and `gguf.GGUFReader` have it."""

    tensors: Any

    def get_field(self, key: str) -> Any:
        """The field under a key (its `contents()` is the value), or None."""


def config_from_gguf(reader: GgufReader, name: str = "") -> ModelConfig:
    """The config in the metadata of an open GGUF file.

    Raises:
      InvalidInputError: a feature the decoder lacks, or a missing or impossible value; it names the feature or key.
    """
    with _readable("the metadata of the GGUF file"):
        return _config_from_gguf(reader, name)


def _config_from_gguf(reader: GgufReader, name: str) -> ModelConfig:
    architecture = str(gguf_field(reader, "general.architecture", "of unknown type"))
    if architecture not in GGUF_ARCHITECTURES:
        raise _unsupported(f"GGUF architecture '{architecture}'", ", ".join(GGUF_ARCHITECTURES))
    if int(gguf_field(reader, "split.count", 1)) > 1:
        raise _unsupported("a GGUF file in several parts", "one file; join them with `llama-gguf-split --merge`")

    def get(key: str, default: Any = None, required: bool = False) -> Any:
        value = gguf_field(reader, f"{architecture}.{key}", default)
        if value is None and required:
            raise InvalidInputError(f"GGUF file has no '{architecture}.{key}'; convert the model again")
        return value

    if int(get("expert_count", 0)) > 0:
        raise _unsupported("mixture of experts", "dense models")
    max_context = int(get("context_length", required=True))
    window = int(get("attention.sliding_window", 0))
    if 0 < window < max_context:
        raise _unsupported(f"sliding window attention ({window} tokens)", "full attention")
    d_model, num_heads = int(get("embedding_length", required=True)), get("attention.head_count", required=True)
    num_kv_heads, d_mlp = get("attention.head_count_kv", num_heads), get("feed_forward_length", required=True)
    for what, value in (("heads", num_heads), ("KV heads", num_kv_heads), ("MLP width", d_mlp)):
        if isinstance(value, list):
            raise _unsupported(f"a number of {what} that varies by layer", "the same number in every layer")
    head_dim = int(get("attention.key_length", d_model // max(1, int(num_heads))))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(get(key, head_dim)) != head_dim:
            raise _unsupported(f"{key}={get(key)} with head width {head_dim}", "one width for q, k, v and RoPE")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise InvalidInputError("GGUF file has no tensor 'token_embd.weight'; it is cut short or not a whole model")
    theta = float(get("rope.freq_base", 10000.0))
    eos = [gguf_field(reader, f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    bos = gguf_field(reader, "tokenizer.ggml.bos_token_id")
    return ModelConfig(
        name=name or str(gguf_field(reader, "general.name", "")),
        architecture=architecture,
        num_layers=int(get("block_count", required=True)),
        d_model=d_model,
        d_mlp=int(d_mlp),
        num_heads=int(num_heads),
        num_kv_heads=int(num_kv_heads),
        head_dim=head_dim,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=_gguf_rope_scaling(get, tensors, head_dim, theta, max_context),
        norm_eps=float(f"{get('attention.layer_norm_rms_epsilon', 1e-5):.7g}"),  # a float32 in the file
        tied_head="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        eos_ids=tuple(dict.fromkeys(int(i) for i in eos if i is not None)),
        bos_id=None if bos is None else int(bos),
        dtype={"F16": "float16", "BF16": "bfloat16"}.get(tensors["token_embd.weight"].tensor_type.name, "float32"),
    )


def gguf_field(reader: GgufReader, key: str, default: Any = None) -> Any:
    """The value of one metadata key of a GGUF file (str, number or list), or `default` if it is not there."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns what a value of the wrong type sets off into an error for the user."""
    try:
        yield
    except InvalidInputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InvalidInputError(
            f"{where} holds a value of the wrong kind ({error}); fetch or convert it again"
        ) from None


def _unsupported(what: str, supported: str) -> InvalidInputError:
    return InvalidInputError(f"{what} is not supported; supported: {supported}")


def _hf_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"config.json has {key}={value!r}; give a whole number")
    return value


def _refuse_hf_features(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise _unsupported(f"a quantised checkpoint ({method})", "float32, bfloat16 and float16, or a GGUF file")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise _unsupported(f"mixture of experts ({key}={config[key]})", "dense models")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _unsupported(f"activation '{config['hidden_act']}'", "silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise _unsupported(f"{key}=true", "bias on q, k and v of qwen2 alone")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise _unsupported(f"partial_rotary_factor={config['partial_rotary_factor']}", "RoPE over the whole head")
    window = config.get("sliding_window")
    used = window is not None and window < config.get("max_position_embeddings", 0)
    if config["model_type"] in ("qwen2", "qwen3"):  # these carry a window in config.json that is switched off
        used = used and bool(config.get("use_sliding_window", False))
    layer_types = config.get("layer_types") or ()
    if layer_types:
        used = "sliding_attention" in layer_types
        if set(layer_types) - {"sliding_attention", "full_attention"}:
            raise _unsupported(f"layer types {sorted(set(layer_types))}", "full_attention")
    if used:
        raise _unsupported(f"sliding window attention ({window} tokens)", "full attention")


def _hf_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InvalidInputError(f"config.json has rope_scaling={rope!r}; give an object")
    return rope


def _hf_rope_scaling(rope: Mapping[str, Any], max_context: int) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    try:
        if kind == "linear":
            return RopeScaling.linear(float(rope["factor"]), max_context)
        if kind == "llama3":
            return RopeScaling(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_max_context=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise InvalidInputError(f"rope_scaling of type '{kind}' lacks {error} in config.json") from None
    raise _unsupported(f"rope_scaling of type '{kind}'", "llama3, linear")


def _rope_scaling_to_hf(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.is_linear:
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_context,
    }


def _gguf_rope_scaling(
    get: Any, tensors: Mapping[str, Any], head_dim: int, theta: float, max_context: int
) -> RopeScaling | None:
    kind = get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise _unsupported(f"GGUF rope scaling '{kind}'", "none, linear, and Llama 3 by rope_freqs.weight")
    factor = float(get("rope.scaling.factor", 1.0))
    linear = RopeScaling.linear(factor, max_context) if kind == "linear" and factor != 1.0 else None
    if "rope_freqs.weight" not in tensors:
        return linear
    wanted = np.asarray(tensors["rope_freqs.weight"].data, np.float64).reshape(-1)
    if np.allclose(wanted, 1.0):
        return linear
    llama3 = RopeScaling(float(wanted.max()), _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT)
    alike = wanted.shape == (head_dim // 2,) and np.allclose(wanted, llama3.divisors(head_dim, theta), rtol=1e-4)
    if linear is None and alike:
        return llama3
    raise _unsupported("this rope_freqs.weight in the GGUF file", "the Llama 3 factors (low 1, high 4, context 8192)")
