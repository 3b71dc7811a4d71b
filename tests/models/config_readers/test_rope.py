"""Rotary settings in all the forms in which checkpoints keep them; what is not understood is refused by name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.config_readers.gguf import config_from_gguf
from nitsum_jax.models.config_readers.rope import rope_of_hf, rope_scaling_to_hf
from nitsum_jax.models.layers.rope_scaling import AnyScaling, LongRopeScaling, RopeScaling, YarnScaling
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LONG = {"type": "su", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
SCALED = RopeScaling(8.0, 1.0, 4.0, 8192)
CONTEXT = 131072
LINEAR = RopeScaling.linear(2.0, CONTEXT)
THETA = {"rope_theta": 5e5}


@pytest.mark.parametrize(
    ("config", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 7, "rope_scaling": None, "rope_parameters": {}}, 7.0, None),
        # transformers 5, flat
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": LLAMA3 | THETA}, 5e5, SCALED),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}, 5e5, LINEAR),
        ({"rope_parameters": THETA, "rope_theta": 1e4}, 5e5, None),  # the value inside comes first
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        # transformers 5, by layer type
        ({"rope_parameters": {"full_attention": LLAMA3 | THETA}}, 5e5, SCALED),
        ({"rope_parameters": {"full_attention": {}}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"full_attention": THETA, "sliding_attention": {"rope_theta": 1e4}}}, 5e5, None),
        ({"rope_parameters": {"full_attention": THETA, "sliding_attention": None}}, 5e5, None),
        # transformers 4
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, 5e5, SCALED),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, LINEAR),
        # nothing changes within the context of the model
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 1e4, None),
        # YaRN and LongRoPE
        ({"rope_scaling": YARN}, 1e4, YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1)),
        ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, 1e4, YarnScaling(4.0, 32768, 1.0)),
        ({"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16}}, 1e4, YarnScaling(4.0, 32768, 1.5, 16.0)),
        (
            {"rope_scaling": LONG, "original_max_position_embeddings": 4096},
            1e4,
            LongRopeScaling((1.0, 2.0), (3.0, 4.0), 4096, math.sqrt(1 + math.log(32) / math.log(4096)), CONTEXT),
        ),
        # both, alike
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5, "rope_parameters": LLAMA3 | THETA}, 5e5, SCALED),
        # settings that ask for nothing
        ({"rope_parameters": {"rope_type": "default", "factor": 1.0, "beta_fast": None}}, 1e4, None),
        ({"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 1}}, 1e4, None),
        # the original context: beside the table, or that of the model
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 8192}, 1e4, SCALED),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
            1e4,
            RopeScaling(8.0, 1.0, 4.0, CONTEXT),
        ),
    ],
)
def test_what_is_understood(config: dict[str, Any], theta: float, scaling: AnyScaling | None) -> None:
    assert rope_of_hf(config, CONTEXT) == (theta, scaling)


@pytest.mark.parametrize("kind", ["proportional", "mrope", 3, None])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_kinds_are_refused(key: str, kind: Any) -> None:
    table = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    for settings in (table, {"full_attention": table}):
        with pytest.raises(InvalidInputError, match=f"{key} of type '{kind}' is not supported"):
            rope_of_hf({key: settings}, CONTEXT)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_parameters": {"factor": 8.0}}, "rope_parameters.*factor=8.0, which type 'default' does not use"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
        ({"rope_parameters": LLAMA3 | {"attention_factor": 1.2}}, "attention_factor=1.2"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "type='yarn' and rope_type='default'"),
        ({"rope_parameters": {"mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks 'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor of rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor of rope_parameters"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "low_freq_factor=1, not less"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta of config.json is None"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]"),
        ({"rope_parameters": {"full_attention": None}}, "nothing of full_attention"),
        ({"rope_parameters": {"sliding_attention": THETA}}, "nothing of full_attention"),
        ({"rope_parameters": {"full_attention": THETA, "rope_theta": 1e4}}, "'rope_theta' beside"),
        ({"rope_parameters": {"main": THETA, "full_attention": THETA}}, "'main' beside"),
        ({"rope_parameters": THETA, "rope_scaling": {"type": "linear", "factor": 2.0}}, "different things"),
        ({"rope_parameters": LLAMA3 | THETA, "rope_scaling": LLAMA3}, "different things"),  # of other theta
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 4096}, "original_max_position_embeddings=4096"),
    ],
)
def test_what_is_not_understood_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        rope_of_hf(config, CONTEXT)
    assert "\n" not in str(error.value)


LONG_ROPE = LongRopeScaling((1.0, 2.0), (3.0, 4.0), 4096, 1.2, CONTEXT)


@pytest.mark.parametrize("scaling", [SCALED, LINEAR, YarnScaling(4.0, 32768, 1.5, truncate=False), LONG_ROPE])
def test_what_is_written_reads_back(scaling: AnyScaling) -> None:
    assert rope_of_hf({"rope_scaling": rope_scaling_to_hf(scaling)}, CONTEXT) == (1e4, scaling)


def gguf_config(path: Path, fields: dict[str, object], rope_freqs: np.ndarray | None = None) -> ModelConfig:
    config = tiny_config()
    named = {f"llama.rope.{key}": value for key, value in fields.items()}
    write_gguf(path / "m.gguf", config, random_tensors(config), fields=named, rope_freqs=rope_freqs)
    return config_from_gguf(GgufFile(path / "m.gguf"))


@pytest.mark.parametrize(
    ("fields", "factor"),
    [
        ({"scale_linear": 4.0}, 4.0),  # the older name
        ({"scaling.factor": 4.0}, 4.0),  # without a kind, llama.cpp takes it for linear
        ({"scaling.type": "linear", "scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 4.0, "scale_linear": 4.0}, 4.0),
        ({"scaling.factor": 0.0, "scale_linear": 4.0}, 4.0),
        ({"scale_linear": 1.0}, None),
        ({"scaling.type": "none", "scaling.factor": 4.0}, None),
    ],
)
def test_gguf_linear_scaling_under_all_its_names(
    tmp_path: Path, fields: dict[str, object], factor: float | None
) -> None:
    expected = None if factor is None else RopeScaling.linear(factor, 128)
    assert gguf_config(tmp_path, fields).rope_scaling == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"scaling.factor": 2.0, "scale_linear": 4.0}, "scale_linear of the GGUF file differ"),
        ({"scale_linear": -2.0}, r"llama\.rope\.scale_linear is -2\.0"),
        ({"scale_linear": "two"}, "wrong kind"),
        ({"freq_base": 0.0}, r"llama\.rope\.freq_base"),
        ({"scaling.alpha": 2.0}, r"llama\.rope\.scaling\.alpha=2\.0"),
        ({"dimension_sections": 16}, "dimension_sections"),
    ],
)
def test_gguf_settings_that_are_not_understood(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        gguf_config(tmp_path, fields)


def test_gguf_factors_of_another_head_width_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"rope_freqs\.weight"):
        gguf_config(tmp_path, {}, rope_freqs=np.ones(2))
