"""Granite 3: embeddings, residuals, scores and logits have scales of their own."""

from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.layers import full_attention
from nitsum_jax.models.config_readers.values import positive
from nitsum_jax.models.families.family import COMMON_KEYS, Family, GgufForm

# Fields of `ModelConfig` -> keys of config.json and of GGUF files.
_SCALES = {
    "embedding_scale": ("embedding_multiplier", "embedding_scale"),
    "residual_scale": ("residual_multiplier", "residual_scale"),
    "query_scale": ("attention_multiplier", "attention.scale"),
    "logit_scale": ("logits_scaling", "logit_scale"),
}


def _granite(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {field: positive(config[key], f"{key} of config.json") for field, (key, _) in _SCALES.items()}
    return {**found, "logit_scale": 1 / found["logit_scale"], **full_attention(config)}


def _written(config: ModelConfig) -> dict[str, Any]:
    scales = {key: getattr(config, field) for field, (key, _) in _SCALES.items()}
    return {**scales, "logits_scaling": float(f"{1 / config.logit_scale:.15g}")}


def _gguf(get: Callable[..., Any], _: Mapping[str, Any]) -> dict[str, Any]:
    found = {field: float(f"{get(key):.7g}") for field, (_, key) in _SCALES.items() if get(key)}
    if "logit_scale" in found:
        found["logit_scale"] = 1 / found["logit_scale"]
    return found


GRANITE = Family(
    architecture="granite",
    title="Granite 3",
    variants="scales of embeddings, residuals, scores and logits",
    hf_class="GraniteForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        **{key: 1.0 for key, _ in _SCALES.values()},
    },
    differences=_granite,
    written=_written,
    gguf=GgufForm(
        architecture="granite",
        interleaved=True,
        keys=frozenset(key for _, key in _SCALES.values()),
        differences=_gguf,
    ),
)
