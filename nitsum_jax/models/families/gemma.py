"""Gemma 2 and 3 (text): norms before and after, windows in most layers, soft caps or norms of q and k."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.models.config import ModelConfig, Rope
from nitsum_jax.models.config_readers.layers import layer_types, window_fields, written_window
from nitsum_jax.models.config_readers.rope import sliding_rope_of_hf
from nitsum_jax.models.config_readers.values import positive, unsupported, whole
from nitsum_jax.models.families.family import COMMON_KEYS, LLAMA_PARTS, Family, GgufForm

_LOCAL_THETA = 10000.0
_DEFAULTS = {
    **COMMON_KEYS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": False,
}
_PARTS = {
    **LLAMA_PARTS,
    "attn.post_norm": "post_attention_layernorm",
    "mlp.norm": "pre_feedforward_layernorm",
    "mlp.post_norm": "post_feedforward_layernorm",
}


def _both(d_model: int) -> dict[str, Any]:
    return {"embedding_scale": math.sqrt(d_model), "norm_offset": 1.0, "post_norms": True}


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["use_bidirectional_attention"]:
        raise unsupported("use_bidirectional_attention", "causal attention")
    caps = {
        field: positive(config[key], f"{key} of config.json") for field, key in _CAPS.items() if config[key] is not None
    }
    scale = positive(config["query_pre_attn_scalar"], "query_pre_attn_scalar of config.json") ** -0.5
    return {**_both(whole(config, "hidden_size")), **caps, "query_scale": scale}


_CAPS = {"attention_soft_cap": "attn_logit_softcapping", "logit_soft_cap": "final_logit_softcapping"}


def _windowed(config: Mapping[str, Any], pattern: int) -> list[bool]:
    """All layers but every `pattern`-th one, if nothing is said."""
    said = layer_types(config)
    return said or [(layer + 1) % pattern != 0 for layer in range(whole(config, "num_hidden_layers"))]


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**_fields(config), **window_fields(config, _windowed(config, 2))}


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    window = window_fields(config, _windowed(config, whole(config, "sliding_window_pattern")), keep=True)
    local = sliding_rope_of_hf(config, whole(config, "max_position_embeddings"), _LOCAL_THETA)
    return {**_fields(config), "qk_norm": True, "local_rope": Rope(*local), **window}


def _written(config: ModelConfig) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    return {
        "query_pre_attn_scalar": float(f"{scale**-2:.9g}"),
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        **written_window(config.window, config.windowed, config.num_layers),
    }


def _written_gemma3(config: ModelConfig) -> dict[str, Any]:
    local = config.local_rope
    return {**_written(config), **({} if local is None else {"rope_local_base_freq": local.theta})}


def _gguf_fields(get: Callable[..., Any], pattern: int, largest: int) -> dict[str, Any]:
    """As llama.cpp has it: windows by a pattern of its own, and another scale of queries in the largest model."""
    layers, d_model, heads = (int(get(key)) for key in ("block_count", "embedding_length", "attention.head_count"))
    width = d_model // heads if layers == largest else int(get("attention.key_length", d_model // heads))
    caps = {
        field: float(get(key))
        for field, key in (
            ("attention_soft_cap", "attn_logit_softcapping"),
            ("logit_soft_cap", "final_logit_softcapping"),
        )
        if get(key)
    }
    window = int(get("attention.sliding_window", 0))
    windowed = tuple((layer + 1) % pattern != 0 for layer in range(layers))
    return {
        **_both(d_model),
        **caps,
        "activation": "gelu_tanh",
        "query_scale": width**-0.5,
        **({"window": window, "windowed": windowed} if window and any(windowed) else {}),
    }


_GGUF_KEYS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
GEMMA2 = Family(
    architecture="gemma2",
    title="Gemma 2",
    variants="windows in every second layer, soft caps of scores and logits, norms (1+w) before and after, scaled "
    "embeddings and queries, GELU",
    hf_class="Gemma2ForCausalLM",
    defaults={
        **_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    differences=_gemma2,
    written=_written,
    activation_key="hidden_activation",
    parts=_PARTS,
    gguf=GgufForm(architecture="gemma2", keys=_GGUF_KEYS, differences=lambda get, _: _gguf_fields(get, 2, 46)),
)
GEMMA3 = Family(
    architecture="gemma3_text",
    title="Gemma 3 (text)",
    variants="as Gemma 2, with windows in 5 of 6 layers that turn by another theta, and norms of each head's q and k "
    "for the caps",
    hf_class="Gemma3ForCausalLM",
    defaults={
        **_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": None,
    },
    differences=_gemma3,
    written=_written_gemma3,
    default_theta=1e6,
    activation_key="hidden_activation",
    parts=_PARTS,
    gguf=GgufForm(
        architecture="gemma3",
        keys=_GGUF_KEYS,
        differences=lambda get, _: {
            **_gguf_fields(get, 6, 62),
            "qk_norm": True,
            "local_rope": Rope(_LOCAL_THETA),
        },
    ),
)
