import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.config_readers.gguf import config_from_gguf
from nitsum_jax.models.config_readers.hf import config_from_hf, config_to_hf
from nitsum_jax.models.layers.rope_scaling import RopeScaling
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf

LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Excerpts of published config.json files.
LLAMA_3_2_1B: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
MISTRAL_7B_V03: dict[str, Any] = {
    "model_type": "mistral",
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32768,
}
QWEN2_5_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B: dict[str, Any] = {
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "llama 3.2": LLAMA_3_2_1B,
    "llama 2": LLAMA_2_7B,
    "mistral": MISTRAL_7B_V03,
    "qwen 2.5": QWEN2_5_7B,
    "qwen 3": QWEN3_0_6B,
}


def test_llama_3() -> None:
    config = config_from_hf(LLAMA_3_2_1B, "Llama-3.2-1B")
    assert config.name == "Llama-3.2-1B"
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.d_mlp) == (32, 8, 64, 8192)
    assert config.rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.tied_head
    assert config.dtype == "bfloat16"


def test_llama_2_defaults() -> None:
    config = config_from_hf(LLAMA_2_7B)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (32, 128, 10000.0)
    assert config.rope_scaling is None
    assert config.eos_ids == (2,)


def test_qwen_has_bias_or_qk_norm() -> None:
    qwen2, qwen3 = config_from_hf(QWEN2_5_7B), config_from_hf(QWEN3_0_6B)
    assert (qwen2.qkv_bias, qwen2.qk_norm) == (True, False)
    assert (qwen3.qkv_bias, qwen3.qk_norm) == (False, True)
    assert qwen3.num_heads * qwen3.head_dim != qwen3.d_model


@pytest.mark.parametrize("published", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_written_config_reads_back_the_same(published: dict[str, Any]) -> None:
    config = config_from_hf(published, "a model")
    assert config_from_hf(config_to_hf(config)) == config


def test_linear_scaling_survives_writing() -> None:
    config = config_from_hf(LLAMA_2_7B | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config_to_hf(config)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def test_newer_files_keep_rope_and_dtype_elsewhere() -> None:
    newer = {key: value for key, value in LLAMA_3_2_1B.items() if key not in ("rope_theta", "rope_scaling")}
    newer["dtype"] = newer.pop("torch_dtype")
    newer["rope_parameters"] = LLAMA3_ROPE | {"rope_theta": 500000.0}
    assert config_from_hf(newer) == config_from_hf(LLAMA_3_2_1B)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "architecture 'mamba'.*llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "architecture"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised checkpoint .fp8.*compressed-tensors, gptq, awq"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "'mrope'.*linear, dynamic, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": 3}, "rope_scaling=3"),
        ({"hidden_size": "big"}, "hidden_size='big'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_layers=0"),
        ({"num_attention_heads": 30}, "multiple"),
        ({"head_dim": 63}, "63"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8"),
        ({"rms_norm_eps": "tiny"}, "wrong kind"),
        ({"eos_token_id": "</s>"}, "wrong kind"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        config_from_hf(LLAMA_3_2_1B | changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "changes", "windowed"),
    [
        (MISTRAL_7B_V03, {"sliding_window": 4096}, (True,) * 32),
        (MISTRAL_7B_V03, {"sliding_window": 32768}, ()),  # never shorter than the context
        (QWEN2_5_7B, {"sliding_window": 4096}, ()),  # switched off
        (QWEN2_5_7B, {"sliding_window": 4096, "use_sliding_window": True}, ()),  # max_window_layers are all
        (
            QWEN2_5_7B,
            {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 20},
            (False,) * 20 + (True,) * 8,
        ),
        (QWEN3_0_6B, {"layer_types": ["full_attention"] * 28}, ()),
    ],
)
def test_layers_that_see_a_window(base: dict[str, Any], changes: dict[str, Any], windowed: tuple[bool, ...]) -> None:
    config = config_from_hf(base | changes)
    assert config.windowed == windowed
    assert config.window == (changes["sliding_window"] if windowed else None)


def test_layers_with_a_window_that_is_switched_off_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="sliding window"):
        config_from_hf(QWEN3_0_6B | {"layer_types": ["full_attention", "sliding_attention"] * 14})


def test_llama3_divisors_follow_the_three_cases() -> None:
    scaling, theta, head_dim = RopeScaling(8.0, 1.0, 4.0, 8192), 500000.0, 128
    for i, divisor in enumerate(scaling.divisors(head_dim, theta)):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            assert divisor == 1.0
        elif wavelength > 8192:
            assert divisor == pytest.approx(8.0, rel=1e-12)
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert divisor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-12)


def test_linear_scaling_divides_every_frequency() -> None:
    scaling = RopeScaling.linear(4.0, 2048)
    assert scaling.is_linear
    assert not RopeScaling(8.0, 1.0, 4.0, 8192).is_linear
    np.testing.assert_array_equal(scaling.divisors(64, 10000.0), 4.0)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gguf_says_the_same(tmp_path: Path, architecture: str, tied: bool) -> None:
    config = tiny_config(architecture=architecture, tied_head=tied, rope_theta=100000.0)
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    assert config_from_gguf(GgufFile(tmp_path / "m.gguf")) == config
    assert config_from_gguf(gguf.GGUFReader(tmp_path / "m.gguf")) == config


def test_gguf_dtype_is_that_of_the_tensors(tmp_path: Path) -> None:
    config = tiny_config()
    for kind, dtype in (("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "float32")):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType[kind])
        assert config_from_gguf(GgufFile(path)).dtype == dtype


def test_gguf_llama3_factors_are_recognised(tmp_path: Path) -> None:
    scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
    config = tiny_config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_tensors(config), rope_freqs=scaling.divisors(64, 500000.0))
    assert config_from_gguf(GgufFile(path)) == config


def test_gguf_factors_of_no_effect(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), rope_freqs=np.ones(4))
    assert config_from_gguf(GgufFile(tmp_path / "m.gguf")).rope_scaling is None


def test_gguf_unknown_factors_are_refused(tmp_path: Path) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), rope_freqs=np.array([1.0, 2.0, 5.0, 7.0]))
    with pytest.raises(InvalidInputError, match=r"rope_freqs\.weight"):
        config_from_gguf(GgufFile(tmp_path / "m.gguf"))


def test_gguf_linear_scaling(tmp_path: Path) -> None:
    config = tiny_config()
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), fields=fields)
    assert config_from_gguf(GgufFile(tmp_path / "m.gguf")).rope_scaling == RopeScaling.linear(4.0, 128)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"llama.attention.sliding_window": 64}, "sliding window"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4"),
        ({"split.count": 2}, "several parts"),
        ({"llama.attention.head_count": 0}, "attention.head_count=0"),
        ({"llama.rope.scaling.factor": "two"}, "wrong kind"),
    ],
)
def test_gguf_what_is_not_supported_is_named(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config), fields=fields)
    with pytest.raises(InvalidInputError, match=message):
        config_from_gguf(GgufFile(tmp_path / "m.gguf"))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InvalidInputError, match="'mamba' is not supported; supported: llama, qwen2, qwen3"):
        config_from_gguf(GgufFile(tmp_path / "m.gguf"))


def test_gguf_without_a_size(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InvalidInputError, match=r"no 'llama\.context_length'"):
        config_from_gguf(GgufFile(tmp_path / "m.gguf"))


def test_configs_are_frozen_and_hashable() -> None:
    config = tiny_config()
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # type: ignore[misc]
