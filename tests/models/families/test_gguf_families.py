"""GGUF files of every family, written as llama.cpp's converter does, hold the model that config.json describes."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.checkpoint.gguf_source import GgufSource
from nitsum_jax.models.checkpoint.leftovers import refuse_leftovers
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.gguf import config_from_gguf
from nitsum_jax.models.config_readers.hf import config_from_hf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.rope_scaling import LongRopeScaling
from nitsum_jax.models.pack import pack
from tests.engine.reference import ArraySource
from tests.models.checkpoint.helpers import to_interleaved_rope
from tests.models.golden import tiny_models

# As llama.cpp has it, the layers of Gemma and SmolLM3 follow fixed patterns, and Gemma's queries have a fixed scale.
LIKE_FILES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention"] * 2,
        "rope_local_base_freq": 10000.0,
    },
    "phi3": {},
    "olmo2": {},
    "granite": {},
    "smollm3": {"no_rope_layers": [1, 1], "use_sliding_window": False},
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
GEMMA_NORMS = {**NORMS, **AFTER, "pre_feedforward_layernorm": "ffn_norm"}
MATRICES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
TOP = {"embed_tokens": "token_embd", "norm": "output_norm"}


def file_name(name: str, variant: str) -> str:
    """What llama.cpp calls a tensor."""
    parts = name.split(".")
    if parts[1] != "layers":
        return f"{TOP[parts[1]] if parts[0] == 'model' else 'output'}.weight"
    norms = GEMMA_NORMS if "gemma" in variant else AFTER if variant == "olmo2" else NORMS
    return f"blk.{parts[2]}.{(MATRICES | norms)[parts[-2]]}.weight"


def write(path: Path, variant: str, config: ModelConfig, **fields: Any) -> Path:
    """The tiny model as a GGUF file."""
    architecture = {"gemma3": "gemma3"}.get(variant, config.architecture)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    if variant != "phi3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_width)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_bos_token_id(tiny_models.BOS)
    writer.add_eos_token_id(tiny_models.EOS)
    writer.add_token_list([str(number) for number in range(config.vocab_size)])
    if config.window is not None:
        writer.add_sliding_window(config.window)
    if variant == "gemma2":
        writer.add_attn_logit_softcapping(3.0)
        writer.add_final_logit_softcapping(6.0)
    if variant == "gemma3":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    if variant == "granite":
        writer.add_embedding_scale(5.0)
        writer.add_residual_scale(0.4)
        writer.add_attention_scale(0.1)
        writer.add_logit_scale(0.7)
    if isinstance(config.rope_scaling, LongRopeScaling):
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_context)
        writer.add_rope_scaling_attn_factors(config.rope_scaling.attention_factor)
        for kind in ("long", "short"):
            factors = np.asarray(getattr(config.rope_scaling, kind), np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    for key, value in fields.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    for name, tensor in tiny_models.tensors(variant).items():
        stored = tensor
        if variant in ("granite", "smollm3") and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_heads if "q_proj" in name else config.num_kv_heads
            stored = to_interleaved_rope(tensor, heads)
        elif "gemma" in variant and "norm" in name:
            stored = tensor + np.float32(1)
        writer.add_tensor(file_name(name, variant), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("variant", LIKE_FILES)
def test_a_file_holds_the_model_of_the_folder(tmp_path: Path, variant: str) -> None:
    expected = config_from_hf(tiny_models.VARIANTS[variant] | LIKE_FILES[variant])
    file = GgufFile(write(tmp_path / "m.gguf", variant, expected))
    found = config_from_gguf(file)
    for field in (*("rope_theta", "local_rope", "rotary_dim", "window", "windowed", "rope_layers"), "activation"):
        assert getattr(found, field) == getattr(expected, field) or field == "rope_layers", field
    # Numbers are float32 in the file.
    for field in ("query_scale", "attention_soft_cap", "logit_soft_cap", "embedding_scale", "logit_scale"):
        assert (getattr(found, field) or 0) == pytest.approx(getattr(expected, field) or 0, rel=1e-6), field
    source, cut = GgufSource(file, found), ModelCut.of(found, 2)
    refuse_leftovers(found, source)
    original = pack(expected, ModelCut.of(expected, 2), ArraySource(tiny_models.tensors(variant)), "float32")
    for (name, vshard, value), (_, _, wanted) in zip(pack(found, cut, source, "float32"), original, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-6, err_msg=f"{name} {vshard}")


def test_smollm3_has_no_rope_in_every_fourth_layer(tmp_path: Path) -> None:
    config = config_from_hf(tiny_models.VARIANTS["smollm3"] | LIKE_FILES["smollm3"])
    found = config_from_gguf(GgufFile(write(tmp_path / "m.gguf", "smollm3", config)))
    assert found.rope_layers == (True, True)
    assert config_from_hf({"model_type": "smollm3"}).rope_layers == (True, True, True, False) * 9


def test_a_window_that_a_family_lacks_is_refused(tmp_path: Path) -> None:
    config = config_from_hf(tiny_models.VARIANTS["olmo2"])
    path = write(tmp_path / "m.gguf", "olmo2", config, **{"attention.sliding_window": 64})
    with pytest.raises(InvalidInputError, match=r"sliding window attention .64 tokens. in a file of olmo2"):
        config_from_gguf(GgufFile(path))
