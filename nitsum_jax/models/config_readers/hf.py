"""The config of a Hugging Face model folder, read as transformers reads it, and written.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.hf_blocks import METHODS
from nitsum_jax.models.config import ARCHITECTURES, ModelConfig
from nitsum_jax.models.config_readers.keys import DEFAULTS, EXPERTS, QUANTISATION, refuse_unknown_keys
from nitsum_jax.models.config_readers.rope import rope_of_hf, rope_scaling_to_hf
from nitsum_jax.models.config_readers.values import positive, readable, shown, unsupported
from nitsum_jax.models.text.special_ids import ids_of_json

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
    _refuse_other_models(config)
    refuse_unknown_keys(config)
    complete = DEFAULTS[architecture] | dict(config)
    _refuse_features(complete)
    d_model, num_heads = _whole(complete, "hidden_size"), _whole(complete, "num_attention_heads")
    max_context = _whole(complete, "max_position_embeddings")
    num_layers = _whole(complete, "num_hidden_layers")
    _refuse_window(complete, num_layers, max_context, said="sliding_window" in config)
    theta, scaling = rope_of_hf(config, max_context)
    vocab_size = _whole(complete, "vocab_size")
    special = ids_of_json(config, vocab_size, "config.json")
    return ModelConfig(
        name=name or str(config.get("_name_or_path", "")),
        architecture=architecture,
        num_layers=num_layers,
        d_model=d_model,
        d_mlp=_whole(complete, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads if complete["num_key_value_heads"] is None else _whole(complete, "num_key_value_heads"),
        head_dim=_head_dim(complete, d_model, num_heads),
        vocab_size=vocab_size,
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=positive(complete["rms_norm_eps"], "rms_norm_eps of config.json"),
        tied_head=_flag(complete, "tie_word_embeddings"),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_ids=special.ends,
        bos_id=special.bos,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers and `config_from_hf` read back as the same model.

    A llama with biases on q, k and v alone (there are GGUF files of such) is what Hugging Face calls qwen2.
    """
    architecture = "qwen2" if config.qkv_bias else config.architecture
    result: dict[str, Any] = {
        "_name_or_path": config.name,
        "architectures": [_HF_CLASSES[architecture]],
        "model_type": architecture,
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
        result["rope_scaling"] = rope_scaling_to_hf(config.rope_scaling)
    return result


def _whole(config: Mapping[str, Any], key: str) -> int:
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"config.json has {key}={shown(value)}; give a whole number")
    return value


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config[key]
    if not isinstance(value, bool):
        raise InvalidInputError(f"config.json has {key}={shown(value)}; give true or false")
    return value


def _head_dim(config: Mapping[str, Any], d_model: int, num_heads: int) -> int:
    if config["head_dim"] is not None or config["model_type"] == "qwen3":  # whose heads do not divide hidden_size
        return _whole(config, "head_dim")
    if num_heads < 1 or d_model % num_heads:
        raise InvalidInputError(
            f"config.json has hidden_size={d_model}, not a multiple of num_attention_heads={num_heads}, and no head_dim"
        )
    return d_model // num_heads


def _refuse_other_models(config: Mapping[str, Any]) -> None:
    for key in QUANTISATION:
        if config.get(key):
            method = config[key].get("quant_method", "unknown") if isinstance(config[key], Mapping) else "unknown"
            if key == "quantization_config" and method in METHODS:
                continue  # its options are looked at with its tensors
            raise unsupported(
                f"a quantised checkpoint ({method})",
                f"float32, bfloat16 and float16, {', '.join(METHODS)}, or a GGUF file",
            )
    for key in EXPERTS:
        if config.get(key):
            raise unsupported(f"mixture of experts ({key}={config[key]})", "dense models")


def _refuse_features(config: Mapping[str, Any]) -> None:
    if config["is_causal"] is not True:
        raise unsupported(f"is_causal={shown(config['is_causal'])}", "causal attention")
    if config["hidden_act"] not in ("silu", "swish"):
        raise unsupported(f"activation '{config['hidden_act']}'", "silu")
    for key in ("attention_bias", "mlp_bias"):
        if config[key]:
            raise unsupported(f"{key}=true", "bias on q, k and v of qwen2 alone")


def _refuse_window(config: Mapping[str, Any], num_layers: int, max_context: int, said: bool) -> None:
    """Refuses attention that sees less than the whole context in any layer."""
    layer_types = _layer_types(config, num_layers)
    window = config["sliding_window"]
    if config["model_type"] in ("qwen2", "qwen3"):
        switched_on = _flag(config, "use_sliding_window") and window is not None
        used = "sliding_attention" in layer_types if layer_types else switched_on
    else:
        switched_on = window is not None
        used = switched_on or "sliding_attention" in layer_types
    if used and not (switched_on and _whole(config, "sliding_window") >= max_context):
        default = "" if said else f", the default of {config['model_type']} where config.json does not say"
        raise unsupported(f"sliding window attention (sliding_window={window}{default})", "full attention")


def _layer_types(config: Mapping[str, Any], num_layers: int) -> list[str]:
    found = config.get("layer_types") or []
    if not isinstance(found, list) or not all(isinstance(kind, str) for kind in found):
        raise InvalidInputError(f"config.json has layer_types={shown(found)}; give a list of names")
    kinds = ["full_attention" if kind == "attention" else kind for kind in found]
    if other := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise unsupported(f"layer types {other}", "full_attention")
    if kinds and len(kinds) != num_layers:
        raise InvalidInputError(f"config.json has {len(kinds)} layer_types but num_hidden_layers={num_layers}")
    return kinds
