"""Qwen 2 and 2.5, with biases on q, k and v, and Qwen 3 (dense), with norms on q and k."""

from nitsum_jax.models.families.family import COMMON_KEYS, Family, GgufForm

_DEFAULTS = {
    **COMMON_KEYS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}

QWEN2 = Family(
    architecture="qwen2",
    title="Qwen 2 and 2.5",
    variants="biases on q, k and v",
    hf_class="Qwen2ForCausalLM",
    defaults=_DEFAULTS,
    differences=lambda _: {"qkv_bias": True},
    gguf=GgufForm(architecture="qwen2", differences=lambda *_: {"qkv_bias": True}),
)
QWEN3 = Family(
    architecture="qwen3",
    title="Qwen 3 (dense)",
    variants="norms of each head's q and k",
    hf_class="Qwen3ForCausalLM",
    defaults={**_DEFAULTS, "head_dim": 128},
    differences=lambda _: {"qk_norm": True},
    gguf=GgufForm(architecture="qwen3", differences=lambda *_: {"qk_norm": True}),
)
