"""The config of a Hugging Face model folder, read as transformers reads it, and written.

Everything the decoder does not implement is refused here, by name, so that a model is never served wrongly.
"""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.hf_blocks import METHODS
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.keys import EXPERTS, QUANTISATION, refuse_unknown_keys
from nitsum_jax.models.config_readers.rope import (
    ORIGINAL_CONTEXT,
    refuse_other_local_rope,
    rope_of_hf,
    rope_scaling_to_hf,
)
from nitsum_jax.models.config_readers.values import flag, positive, readable, shown, unsupported, whole
from nitsum_jax.models.families.registry import family_of
from nitsum_jax.models.text.special_ids import ids_of_json

# Models of text and pictures -> their language model; and keys that are beside it.
_WITH_TEXT = {"gemma3": "gemma3_text"}
_OF_BOTH = ("_name_or_path", "bos_token_id", "eos_token_id", "dtype", "torch_dtype")
# As config.json says it -> as `ModelConfig` does.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def config_from_hf(config: Mapping[str, Any], name: str = "") -> ModelConfig:
    """The config of a Hugging Face `config.json`.

    Args:
      config: the parsed JSON.
      name: for people; by default the `_name_or_path` of the file.

    Raises:
      InvalidInputError: a feature the decoder lacks, or a missing or impossible value; it names the feature or key.
    """
    with readable("config.json"):
        return _config_from_hf(text_part(config), name)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the language model in one that sees pictures too, or the config as it is."""
    kind, inner = config.get("model_type"), config.get("text_config")
    if kind not in _WITH_TEXT or not isinstance(inner, Mapping):
        return config
    outer = {key: config[key] for key in _OF_BOTH if config.get(key) is not None}
    return {**inner, **outer, "model_type": _WITH_TEXT[str(kind)]}


def _config_from_hf(config: Mapping[str, Any], name: str) -> ModelConfig:
    architecture = str(config.get("model_type", "of unknown type"))
    family = family_of(architecture)
    _refuse_other_models(config)
    refuse_unknown_keys(config, family)
    complete = {**family.defaults, **config}
    _refuse_features(complete)
    d_model, num_heads = whole(complete, "hidden_size"), whole(complete, "num_attention_heads")
    max_context = whole(complete, "max_position_embeddings")
    num_layers = whole(complete, "num_hidden_layers")
    # Phi's config class has an original context even where the file says nothing.
    said = {key: value for key, value in complete.items() if key in config or key == ORIGINAL_CONTEXT}
    theta, scaling = rope_of_hf(said, max_context, family.default_theta, partial=family.partial_rotary)
    vocab_size = whole(complete, "vocab_size")
    special = ids_of_json(config, vocab_size, "config.json")
    made = ModelConfig(
        name=name or str(config.get("_name_or_path", "")),
        architecture=architecture,
        num_layers=num_layers,
        d_model=d_model,
        d_mlp=whole(complete, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_heads if complete["num_key_value_heads"] is None else whole(complete, "num_key_value_heads"),
        head_dim=_head_dim(complete, d_model, num_heads, needed=family.defaults["head_dim"] is not None),
        vocab_size=vocab_size,
        max_context=max_context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=positive(complete["rms_norm_eps"], "rms_norm_eps of config.json"),
        tied_head=flag(complete, "tie_word_embeddings"),
        activation=_activation(complete, family.activation_key),
        eos_ids=special.ends,
        bos_id=special.bos,
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        **family.differences(complete),
    )
    if made.window is not None and made.local_rope is None:
        refuse_other_local_rope(said, max_context, (theta, scaling))
    return made


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` that transformers and `config_from_hf` read back as the same model.

    A llama with biases on q, k and v alone (there are GGUF files of such) is what Hugging Face calls qwen2.
    """
    family = family_of("qwen2" if config.qkv_bias else config.architecture)
    result: dict[str, Any] = {
        "_name_or_path": config.name,
        "architectures": [family.hf_class],
        "model_type": family.architecture,
        family.activation_key: {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation],
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
    if config.rope_scaling is not None:
        result["rope_scaling"] = rope_scaling_to_hf(config.rope_scaling)
    return result | family.written(config)


def _head_dim(config: Mapping[str, Any], d_model: int, num_heads: int, *, needed: bool) -> int:
    if config["head_dim"] is not None or needed:
        return whole(config, "head_dim")
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


def _activation(config: Mapping[str, Any], key: str) -> str:
    found = str(config[key])
    if found not in _ACTIVATIONS:
        raise unsupported(f"activation '{found}'", ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[found]


def _refuse_features(config: Mapping[str, Any]) -> None:
    if config["is_causal"] is not True:
        raise unsupported(f"is_causal={shown(config['is_causal'])}", "causal attention")
    for key in ("attention_bias", "mlp_bias"):
        if config[key]:
            raise unsupported(f"{key}=true", "bias on q, k and v of qwen2 alone")
