"""Llama 2 and 3, SmolLM2 and what else calls itself llama; Mistral, which has a window where nothing is said."""

from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.layers import full_attention, window_everywhere
from nitsum_jax.models.families.family import COMMON_KEYS, Family, GgufForm

LLAMA = Family(
    architecture="llama",
    title="Llama 2 and 3, SmolLM2",
    variants="",
    hf_class="LlamaForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    differences=full_attention,
    # Mistral's files call themselves llama, too, and some have biases.
    gguf=GgufForm(
        architecture="llama",
        interleaved=True,
        differences=lambda _, tensors: {"qkv_bias": "blk.0.attn_q.bias" in tensors},
    ),
)


def _mistral_written(config: ModelConfig) -> dict[str, object]:
    return {"sliding_window": config.window}  # transformers' own default is a window of 4096


MISTRAL = Family(
    architecture="mistral",
    title="Mistral",
    variants="a window in every layer, or none",
    hf_class="MistralForCausalLM",
    defaults={
        **COMMON_KEYS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    differences=window_everywhere,
    written=_mistral_written,
)
