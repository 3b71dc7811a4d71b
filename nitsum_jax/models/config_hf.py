"""The config of a Hugging Face model folder, read as transformers reads it, and written.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ARCHITECTURES, ModelConfig, RopeScaling
from nitsum_jax.models.config_values import readable, unsupported
from nitsum_jax.models.special_ids import ids_of_json

_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def config_from_hf(config: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The config of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      name: for people; by default the `_name_or_path` of the file.

    Raises:
      InvalidInputError: a feature the decoder lacks, or a missing or impossible value; it names the feature or key.
    """
    with readable("config.json"):
        return _config_from_hf(config, name)


def _config_from_hf(config: Mapping[str, Any], name: str) -> ModelConfig:
    architecture = str(config.get("model_type", "of unknown type"))
    if architecture not in ARCHITECTURES:
        raise unsupported(f"model architecture '{architecture}'", ", ".join(ARCHITECTURES))
    _refuse_hf_features(config)
    d_model, num_heads = _hf_int(config, "hidden_size"), _hf_int(config, "num_attention_heads")
    max_context = _hf_int(config, "max_position_embeddings")
    rope = _hf_rope(config)
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    vocab_size = _hf_int(config, "vocab_size")
    special = ids_of_json(config, vocab_size, "config.json")
    return ModelConfig(
        name=name or str(config.get("_name_or_path", "")),
        architecture=architecture,
        num_layers=_hf_int(config, "num_hidden_layers"),
        d_model=d_model,
        d_mlp=_hf_int(config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=_hf_int(config, "num_key_value_heads", num_heads),
        head_dim=_hf_int(config, "head_dim", d_model // num_heads if num_heads > 0 else 0),
        vocab_size=vocab_size,
        max_context=max_context,
        rope_theta=float(theta),
        rope_scaling=_hf_rope_scaling(rope, max_context),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_head=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_ids=special.ends,
        bos_id=special.bos,
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
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
        "bos_token_id": config.bos_id,
        "torch_dtype": config.dtype,
    }
    if config.architecture == "mistral":
        result["sliding_window"] = None  # transformers' own default is a window of 4096
    if config.rope_scaling is not None:
        result["rope_scaling"] = _rope_scaling_to_hf(config.rope_scaling)
    return result


def _hf_int(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"config.json has {key}={value!r}; give a whole number")
    return value


def _refuse_hf_features(config: Mapping[str, Any]) -> None:
    if config.get("quantization_config") is not None:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise unsupported(f"a quantised checkpoint ({method})", "float32, bfloat16 and float16, or a GGUF file")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise unsupported(f"mixture of experts ({key}={config[key]})", "dense models")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise unsupported(f"activation '{config['hidden_act']}'", "silu")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise unsupported(f"{key}=true", "bias on q, k and v of qwen2 alone")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
        raise unsupported(f"partial_rotary_factor={config['partial_rotary_factor']}", "RoPE over the whole head")
    window = config.get("sliding_window")
    used = window is not None and window < config.get("max_position_embeddings", 0)
    if config["model_type"] in ("qwen2", "qwen3"):  # these carry a window in config.json that is switched off
        used = used and bool(config.get("use_sliding_window", False))
    layer_types = config.get("layer_types") or ()
    if layer_types:
        used = "sliding_attention" in layer_types
        if set(layer_types) - {"sliding_attention", "full_attention"}:
            raise unsupported(f"layer types {sorted(set(layer_types))}", "full_attention")
    if used:
        raise unsupported(f"sliding window attention ({window} tokens)", "full attention")


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
    raise unsupported(f"rope_scaling of type '{kind}'", "llama3, linear")


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
