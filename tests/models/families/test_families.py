"""What config.json of each family says, what is written back, and what is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource
from nitsum_jax.models.config import AttentionVariant, Rope
from nitsum_jax.models.config_readers.hf import config_from_hf, config_to_hf
from nitsum_jax.models.convert import convert
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.rope_scaling import LongRopeScaling, YarnScaling
from nitsum_jax.models.loading import open_model
from nitsum_jax.models.pack import pack
from tests.engine.reference import ArraySource
from tests.models.golden import tiny_models

# As published with gemma-3-1b-it, what matters of it.
GEMMA_3_1B: dict[str, Any] = {
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_what_is_written_reads_back(variant: str) -> None:
    config = config_from_hf(tiny_models.VARIANTS[variant], variant)
    written = config_to_hf(config)
    assert config_from_hf(json.loads(json.dumps(written))) == config


def test_gemma_3_turns_layers_with_a_window_otherwise() -> None:
    config = config_from_hf(GEMMA_3_1B)
    kinds = [config.attention_of(layer).window for layer in range(7)]
    assert kinds == [512] * 5 + [None, 512]
    assert config.rope_of(5) == Rope(1e6)
    assert config.rope_of(0) == Rope(1e4)
    assert config.attention_of(0) == AttentionVariant(512, None, 1 / 16)
    assert config.window_everywhere is None
    assert config.activation == "gelu_tanh"


def test_the_text_part_of_gemma_3_with_pictures() -> None:
    inner = {key: value for key, value in GEMMA_3_1B.items() if key != "eos_token_id"}
    whole = {"model_type": "gemma3", "text_config": inner, "vision_config": {"x": 1}, "eos_token_id": [1, 106]}
    assert config_from_hf(whole) == config_from_hf(GEMMA_3_1B)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_tensors_of_the_text_part(tmp_path: Path, prefix: str) -> None:
    tensors = tiny_models.tensors("gemma3")
    stored = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    stored["vision_tower.vision_model.post_layernorm.weight"] = np.zeros(3, np.float32)
    save_file(stored, tmp_path / "model.safetensors")
    assert set(SafetensorsSource(tmp_path).names()) == set(tensors)


def test_longrope_has_other_frequencies_where_sequences_may_be_long() -> None:
    config = config_from_hf(tiny_models.VARIANTS["phi3"])
    scaling = config.rope_scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.attention_factor == pytest.approx(np.sqrt(1 + np.log(512 / 16) / np.log(16)))
    np.testing.assert_array_equal(scaling.divisors(12, 1e4), scaling.long)
    short = config.served_up_to(16).rope_scaling
    assert short is not None
    np.testing.assert_array_equal(short.divisors(12, 1e4), scaling.short)
    assert config.served_up_to(17).rope_scaling == dataclasses.replace(scaling, longest=17)


def test_yarn_divides_slow_features_and_keeps_fast_ones() -> None:
    scaling = config_from_hf(tiny_models.VARIANTS["llama_yarn"]).rope_scaling
    assert scaling == YarnScaling(4.0, 32, 0.1 * np.log(4) + 1)
    divisors = scaling.divisors(16, 100.0)
    assert divisors[0] == 1
    assert divisors[-1] == pytest.approx(4)
    assert (np.diff(divisors) >= 0).all()


@pytest.mark.parametrize(
    ("variant", "keys", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer types .'chunked_attention'."),
        ("gemma2", {"sliding_window": None}, "sliding_window=None"),
        ("olmo2", {"sliding_window": 8}, "sliding window attention in a model of type olmo2"),
        ("phi3", {"rope_scaling": {"rope_type": "longrope", "short_factor": 1, "long_factor": []}}, "short_factor=1"),
        ("phi3", {"partial_rotary_factor": 0.5}, "LongRoPE factors for .6. features, not 4"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granite", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0, which is not understood"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("mistral_window", {"sliding_window": -1}, "sliding_window=-1"),
        (
            "mistral_window",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 5.0}}},
            "rope_parameters of sliding_attention",
        ),
    ],
)
def test_what_is_not_supported_is_named(variant: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        config_from_hf(tiny_models.VARIANTS[variant] | keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", ["phi3", "olmo2"])  # fused tensors, and norms that are cut
def test_virtual_shards_on_disk_hold_the_same_model(tmp_path: Path, variant: str) -> None:
    convert(str(tiny_models.write_hf_folder(variant, tmp_path / variant)), str(tmp_path / "orbax"), "orbax", vshards=4)
    made = open_model(str(tmp_path / "orbax"))
    source, cut = ArraySource(tiny_models.tensors(variant)), ModelCut.of(made.config, 4)
    expected = {(name, vshard): value for name, vshard, value in pack(made.config, cut, source, "float32")}
    found = {(name, vshard): value for name, vshard, value in made.weights(cut, "float32")}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    for name, tensor in tiny_models.tensors(variant).items():  # and back, from its pieces
        np.testing.assert_array_equal(made.source.read(name), tensor)
