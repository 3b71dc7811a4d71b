"""Shapes of the models that are timed; their weights are random."""

import dataclasses

from nitsum_jax.models.config import ModelConfig

LLAMA_8B = ModelConfig(
    "Llama-3.1-8B", "llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, rope_theta=500000.0, dtype="bfloat16"
)
QWEN_32B = ModelConfig(
    "Qwen2.5-32B", "qwen2", 64, 5120, 27648, 40, 8, 128, 152064, 32768, rope_theta=1e6, qkv_bias=True, dtype="bfloat16"
)
LLAMA_70B = ModelConfig(
    "Llama-3.1-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072, rope_theta=500000.0, dtype="bfloat16"
)
TINY = ModelConfig("tiny", "llama", 4, 64, 128, 8, 8, 16, 256, 1024)


def with_layers(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with fewer layers."""
    return dataclasses.replace(config, num_layers=layers)


def slice_of(config: ModelConfig, tp: int) -> ModelConfig:
    """What one of `tp` devices computes, as a model of its own: its heads, MLP columns and vocabulary rows."""
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // tp,
        num_kv_heads=max(1, config.num_kv_heads // tp),
        d_mlp=config.d_mlp // tp,
        vocab_size=config.vocab_size // tp,
    )


def layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer's matrices."""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.d_model * config.head_dim * (heads + config.num_heads)
    return attention + 3 * config.d_model * config.d_mlp


def head_parameters(config: ModelConfig) -> int:
    """Weights of the output head (the embedding is only looked up)."""
    return config.vocab_size * config.d_model


def kv_bytes(config: ModelConfig, itemsize: int) -> int:
    """Bytes of keys and values per token and layer."""
    return 2 * config.num_kv_heads * config.head_dim * itemsize
