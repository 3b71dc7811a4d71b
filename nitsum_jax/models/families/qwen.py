"""Qwen 2 and 2.5, with biases on q, k and v, and Qwen 3 (dense), with norms on q and k."""

from collections.abc import Mapping
from typing import Any

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.layers import layer_types, window_fields, written_window
from nitsum_jax.models.config_readers.values import flag, unsupported, whole
from nitsum_jax.models.families.family import COMMON_KEYS, Family, GgufForm

_DEFAULTS = {
    **COMMON_KEYS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window, of layers from `max_window_layers` on if nothing else is said, and only if it is switched on."""
    said = layer_types(config)
    if not flag(config, "use_sliding_window") or config["sliding_window"] is None:
        if any(said or ()):
            raise unsupported("sliding window attention in layer_types that use_sliding_window switches off", "either")
        return {}
    first = whole(config, "max_window_layers")
    return window_fields(config, said or [layer >= first for layer in range(whole(config, "num_hidden_layers"))])


def _written(config: ModelConfig) -> dict[str, Any]:
    window = {} if config.window is None else written_window(config.window, config.windowed, config.num_layers)
    return {"use_sliding_window": config.window is not None, **window}


QWEN2 = Family(
    architecture="qwen2",
    title="Qwen 2 and 2.5",
    variants="biases on q, k and v; windows",
    hf_class="Qwen2ForCausalLM",
    defaults=_DEFAULTS,
    differences=lambda config: {"qkv_bias": True, **_window(config)},
    written=_written,
    gguf=GgufForm(architecture="qwen2", differences=lambda *_: {"qkv_bias": True}),
)
QWEN3 = Family(
    architecture="qwen3",
    title="Qwen 3 (dense)",
    variants="norms of each head's q and k; windows",
    hf_class="Qwen3ForCausalLM",
    defaults={**_DEFAULTS, "head_dim": 128},
    differences=lambda config: {"qk_norm": True, **_window(config)},
    written=_written,
    gguf=GgufForm(architecture="qwen3", differences=lambda *_: {"qk_norm": True}),
)
