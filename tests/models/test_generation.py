"""What a checkpoint says about how its model is to be sampled."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults, generation_defaults
from nitsum_jax.models.loading import open_model
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf
from tests.models.golden import tiny_models

V = 1000


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_length": 4096, "pad_token_id": None}, {}),
        # The published files of some families, by their numbers.
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
        ),
        (
            {"temperature": 1, "min_p": 0.05, "max_new_tokens": 2048},
            {"temperature": 1.0, "min_p": 0.05, "max_new_tokens": 2048},
        ),
        # transformers: false is greedy whatever the temperature is, true alone has temperature 1.
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": None, "temperature": None, "top_k": None}, {}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 50.0}, {"top_k": 50}),
        ({"top_k": V}, {"top_k": 0}),
    ],
)
def test_what_is_used(said: dict[str, Any], expected: dict[str, Any]) -> None:
    assert generation_defaults(said, V) == GenerationDefaults(**expected)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot', which is not a number"),
        ({"top_p": True}, "top_p is True, which is not a number"),
        ({"top_k": 2.5}, "top_k is 2.5, which is no whole number"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf, which is no whole number"),
        ({"max_new_tokens": 10**400}, "max_new_tokens is larger than any number"),
    ],
)
def test_what_cannot_be_used(said: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generation_defaults(said, V)


def test_in_words() -> None:
    assert str(GenerationDefaults(temperature=0.6, top_k=0, top_p=0.9)) == "temperature 0.6, top_k 0, top_p 0.9"
    assert str(GenerationDefaults()) == ""


def test_a_folder_says_it_in_generation_config_json(tmp_path: Path) -> None:
    folder = tiny_models.write_hf_folder("llama_odd", tmp_path)
    file = folder / "generation_config.json"
    assert generation_defaults(open_model(str(folder)).generation, V) == GenerationDefaults()
    file.write_text(json.dumps({**json.loads(file.read_text()), "do_sample": True, "top_p": 0.9}))
    assert generation_defaults(open_model(str(folder)).generation, V) == GenerationDefaults(temperature=1.0, top_p=0.9)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [(0.6, GenerationDefaults(0.6, 40, 0.95, 0.05, 1.1)), (-1.0, GenerationDefaults(0.0, 40, 0.95, 0.05, 1.1))],
)
def test_a_gguf_file_says_it_in_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float, expected: GenerationDefaults
) -> None:
    keys = gguf.Keys.General
    add_architecture = gguf.GGUFWriter.add_architecture

    def with_sampling(writer: gguf.GGUFWriter) -> None:
        add_architecture(writer)
        writer.add_float32(keys.SAMPLING_TEMP, temperature)
        writer.add_int32(keys.SAMPLING_TOP_K, 40)
        writer.add_float32(keys.SAMPLING_TOP_P, 0.95)
        writer.add_float32(keys.SAMPLING_MIN_P, 0.05)
        writer.add_float32(keys.SAMPLING_PENALTY_REPEAT, 1.1)

    monkeypatch.setattr(gguf.GGUFWriter, "add_architecture", with_sampling)
    config = tiny_config()
    write_gguf(tmp_path / "m.gguf", config, random_tensors(config))
    assert generation_defaults(open_model(str(tmp_path / "m.gguf")).generation, V) == expected
