"""Missing keys take the default of transformers for the architecture; keys that are not understood are refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.gguf import config_from_gguf
from nitsum_jax.models.config_readers.hf import config_from_hf, config_to_hf
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf

# What transformers 5.24 makes of a config.json with nothing but the model type (and, for Mistral, no window).
BARE: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "d_mlp": 11008, "num_kv_heads": 32, "head_dim": 128, "max_context": 2048},
    "mistral": {"vocab_size": 32000, "d_mlp": 14336, "num_kv_heads": 8, "head_dim": 128, "max_context": 131072},
    "qwen2": {"vocab_size": 151936, "d_mlp": 22016, "num_kv_heads": 32, "head_dim": 128, "max_context": 32768},
    "qwen3": {"vocab_size": 151936, "d_mlp": 22016, "num_kv_heads": 32, "head_dim": 128, "max_context": 32768},
}
ARCHITECTURES = list(BARE)


def bare(architecture: str, **keys: Any) -> dict[str, Any]:
    return {"model_type": architecture, "sliding_window": None, **keys}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_missing_key_takes_the_default_of_its_architecture(architecture: str) -> None:
    expected = ModelConfig(
        name="",
        architecture=architecture,
        num_layers=32,
        d_model=4096,
        num_heads=32,
        rope_theta=10000.0,
        norm_eps=1e-6,
        tied_head=False,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        **BARE[architecture],
    )
    assert config_from_hf(bare(architecture)) == expected


@pytest.mark.parametrize(
    ("architecture", "keys", "kv_heads", "head_dim"),
    [
        ("llama", {"num_attention_heads": 16}, 16, 256),  # as many as query heads
        ("mistral", {"num_attention_heads": 16}, 8, 256),
        ("qwen2", {"num_attention_heads": 64}, 32, 64),
        ("qwen3", {"num_attention_heads": 64}, 32, 128),  # not hidden_size / num_attention_heads
        ("qwen2", {"num_attention_heads": 16, "num_key_value_heads": None}, 16, 256),
        ("llama", {"head_dim": None}, 32, 128),
    ],
)
def test_heads_that_are_not_said(architecture: str, keys: dict[str, Any], kv_heads: int, head_dim: int) -> None:
    config = config_from_hf(bare(architecture, **keys))
    assert (config.num_kv_heads, config.head_dim) == (kv_heads, head_dim)


def test_mistral_has_a_window_where_nothing_is_said() -> None:
    assert config_from_hf({"model_type": "mistral"}).window_everywhere == 4096
    assert config_from_hf({"model_type": "mistral", "max_position_embeddings": 4096}).max_context == 4096
    assert config_from_hf({"model_type": "qwen2"}).architecture == "qwen2"  # its window is switched off


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, which is not understood"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("llama", {"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        ("qwen3", {"use_new_norm": True}, "use_new_norm=True"),
        ("qwen3", {"head_dim": None}, "head_dim=None"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "quantised checkpoint"),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps of config.json is None"),
        ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false'"),
        ("llama", {"hidden_size": 4100, "num_attention_heads": 24}, "hidden_size=4100, not a multiple"),
        ("qwen2", {"use_sliding_window": "no"}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "1 layer_types but num_hidden_layers=32"),
        ("qwen2", {"layer_types": ["full_attention", "mamba"]}, "layer types .'mamba'."),
        ("qwen2", {"layer_types": "full_attention"}, "layer_types='full_attention'"),
        (
            "mistral",
            {"sliding_window": 64, "layer_types": ["full_attention"] * 32},
            "layer_types of mistral with sliding_window=64",
        ),
        ("llama", {"layer_types": ["sliding_attention"] * 32}, "sliding window"),
    ],
)
def test_what_changes_the_numbers_and_is_not_understood_is_refused(
    architecture: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        config_from_hf(bare(architecture) | keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {"dtype": "q4"}},  # SmolLM2
        {"attention_dropout": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "pretraining_tp": 2},
        {"temperature": 0.6, "top_p": 0.9, "max_length": 20, "use_cache": False},
        {"_attn_implementation": "sdpa", "transformers_version": "5.0.0", "architectures": ["LlamaForCausalLM"]},
        {"per_layer_config": None, "final_logit_softcapping": None, "use_new_norm": False, "pruned_heads": {}},
        {"quantization_config": None, "num_local_experts": 0, "pad_token_id": 2**40},
        {"layer_types": ["full_attention"] * 31 + ["attention"], "hidden_act": "swish"},
        {"use_sliding_window": True, "sliding_window": 2**20},  # never shorter than the context
    ],
    ids=lambda keys: next(iter(keys)),
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_harmless_keys_pass(architecture: str, keys: dict[str, Any]) -> None:
    assert config_from_hf(bare(architecture) | keys) == config_from_hf(bare(architecture))


def gguf_config(path: Path, fields: dict[str, object], **changes: Any) -> ModelConfig:
    config = tiny_config(**changes)
    write_gguf(path / "m.gguf", config, random_tensors(config), fields=fields)
    return config_from_gguf(GgufFile(path / "m.gguf"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0, which is not understood"),
        ({"llama.logit_scale": 8.0}, "logit_scale"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ({"llama.attention.causal": False}, "attention.causal=False"),
    ],
)
def test_gguf_keys_that_are_not_understood_are_refused(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        gguf_config(tmp_path, fields)


def test_gguf_keys_that_change_nothing_pass(tmp_path: Path) -> None:
    fields: dict[str, object] = {
        "llama.vocab_size": 300,
        "llama.logit_scale": 1.0,
        "llama.attention.causal": True,
        "llama.expert_used_count": 2,
        "llama.rope.scaling.original_context_length": 64,
        "qwen2.logit_scale": 8.0,  # of another architecture
        "general.quantization_version": 2,
    }
    assert gguf_config(tmp_path, fields) == tiny_config()


def test_gguf_without_epsilon_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    old, new = b"llama.attention.layer_norm_rms_epsilon", b"other.attention.layer_norm_rms_epsilon"
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes().replace(old, new))
    with pytest.raises(InvalidInputError, match=r"no 'llama\.attention\.layer_norm_rms_epsilon'"):
        config_from_gguf(GgufFile(tmp_path / "m.gguf"))


def test_a_llama_with_biases_is_written_as_qwen2(tmp_path: Path) -> None:
    config = gguf_config(tmp_path, {}, qkv_bias=True)
    assert config.qkv_bias
    assert config_from_hf(config_to_hf(config)) == dataclasses.replace(config, architecture="qwen2")
