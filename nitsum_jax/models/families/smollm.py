"""SmolLM3: q and k of every fourth layer do not turn with the position."""

from collections.abc import Callable, Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.layers import layer_types, window_fields, written_window
from nitsum_jax.models.config_readers.values import flag, shown, whole
from nitsum_jax.models.families.family import COMMON_KEYS, Family, GgufForm

_INTERVAL = 4


def _smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    layers, said = whole(config, "num_hidden_layers"), config["no_rope_layers"]
    turning = _all_but(whole(config, "no_rope_layer_interval"), layers) if said is None else said
    if not isinstance(turning, list) or len(turning) < layers or any(one not in (0, 1) for one in turning):
        raise InvalidInputError(f"config.json has no_rope_layers={shown(said)}; give 0 or 1 for each layer")
    turning = [bool(one) for one in turning[:layers]]
    window = {}
    if flag(config, "use_sliding_window") and config["sliding_window"] is not None:
        window = window_fields(config, layer_types(config) or [not one for one in turning])
    return {**window, "rope_layers": () if all(turning) else tuple(turning)}


def _all_but(interval: int, layers: int) -> list[bool]:
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _written(config: ModelConfig) -> dict[str, Any]:
    turning = config.rope_layers[: config.num_layers] or (True,) * config.num_layers
    window = {} if config.window is None else written_window(config.window, config.windowed, config.num_layers)
    return {
        "no_rope_layers": [int(one) for one in turning],
        "use_sliding_window": config.window is not None,
        **window,
    }


def _gguf(get: Callable[..., Any], _: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_layers": tuple(_all_but(_INTERVAL, int(get("block_count"))))}  # as llama.cpp has it


SMOLLM3 = Family(
    architecture="smollm3",
    title="SmolLM3",
    variants="no RoPE in every fourth layer; windows",
    hf_class="SmolLM3ForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": _INTERVAL,
    },
    differences=_smollm3,
    written=_written,
    default_theta=2e6,
    gguf=GgufForm(architecture="smollm3", interleaved=True, differences=_gguf),
)
