"""Phi 3 and 4: fused tensors, LongRoPE, and heads of which only a part turns (Phi-4-mini)."""

from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.layers import window_everywhere
from nitsum_jax.models.config_readers.values import positive, whole
from nitsum_jax.models.families.family import COMMON_KEYS, LLAMA_PARTS, Family, GgufForm


def _phi3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**window_everywhere(config), **_turning(config)}


def _turning(config: Mapping[str, Any]) -> dict[str, Any]:
    tables = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    said = [holder.get("partial_rotary_factor") for holder in (*tables, config)]
    factor = next((one for one in said if one is not None), 1)
    share = positive(factor, "partial_rotary_factor of config.json")
    if share > 1:
        raise InvalidInputError(f"config.json has partial_rotary_factor={share:g}; give at most 1")
    heads, width = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    head_dim = width // heads if config["head_dim"] is None else whole(config, "head_dim")
    return {} if share == 1 else {"rotary_dim": int(head_dim * share)}


def _written(config: ModelConfig) -> dict[str, Any]:
    long, share = config.rope_scaling, config.rotary_width / config.head_dim
    context = {"original_max_position_embeddings": long.original_max_context} if long is not None else {}
    return {"sliding_window": config.window, "partial_rotary_factor": share, **context}


def _gguf(get: Callable[..., Any], _: Mapping[str, Any]) -> dict[str, Any]:
    window, layers = int(get("attention.sliding_window", 0)), int(get("block_count"))
    turning, head_dim = get("rope.dimension_count"), int(get("embedding_length")) // int(get("attention.head_count"))
    found: dict[str, Any] = {} if turning in (None, head_dim) else {"rotary_dim": int(turning)}
    if 0 < window < int(get("context_length")):
        found |= {"window": window, "windowed": (True,) * layers}
    return found


PHI3 = Family(
    architecture="phi3",
    title="Phi 3 and 4",
    variants="LongRoPE, RoPE over a part of the head, windows, fused q, k, v and gate, up",
    hf_class="Phi3ForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096,
    },
    differences=_phi3,
    written=_written,
    partial_rotary=True,
    parts={
        **LLAMA_PARTS,
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), "self_attn.qkv_proj"),
        **dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
    },
    gguf=GgufForm(architecture="phi3", keys=frozenset({"rope.scaling.attn_factor"}), differences=_gguf),
)
