"""The golden files belong to the code that made them, and the tiny models load as published models would."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.models.text.tokenizer import Tokenizer
from tests.models.golden import smollm2_prompts, tiny_models

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tiny_logits() -> dict[str, np.ndarray]:
    with np.load(HERE / "tiny_logits.npz") as file:
        return dict(file)


def test_there_are_logits_of_every_variant_and_no_other(tiny_logits: dict[str, np.ndarray]) -> None:
    assert {name for name in tiny_logits if "." not in name} == set(tiny_models.VARIANTS)


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_tiny_logits_are_of_these_weights(variant: str, tiny_logits: dict[str, np.ndarray]) -> None:
    assert tiny_models.checksum(variant) == tiny_logits[f"{variant}.checksum"], "run make_golden.py --tiny again"
    logits = tiny_logits[variant]
    vocab_size = tiny_models.VARIANTS[variant]["vocab_size"]
    assert logits.shape == (tiny_models.NUM_SEQUENCES, tiny_models.SEQUENCE_LENGTH, vocab_size)
    assert logits.dtype == np.float32
    assert 2 < logits.std() < 4  # clearly spread, so that agreement within 1e-3 says something
    ids = tiny_models.token_ids(variant)
    assert ids.shape == logits.shape[:2]
    assert ids.min() >= 0
    assert ids.max() < vocab_size


@pytest.mark.parametrize("shards", [1, 3])
def test_hf_folder(tmp_path: Path, shards: int) -> None:
    folder = tiny_models.write_hf_folder("qwen2", tmp_path / "model", shards=shards)
    assert json.loads((folder / "config.json").read_text()) == tiny_models.VARIANTS["qwen2"]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    parts = {file.name: load_file(file) for file in files}
    written = {name: tensor for part in parts.values() for name, tensor in part.items()}
    expected = tiny_models.tensors("qwen2")
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[name], expected[name]) for name in expected)
    if shards > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}


def test_hf_folder_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(tiny_models.write_hf_folder("llama_odd", tmp_path))
    assert tokenizer.vocab_size <= min(config["vocab_size"] for config in tiny_models.VARIANTS.values())
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (tiny_models.BOS, (tiny_models.EOS,))
    text = "the cat and you: 12 + 30 = 42!\nis it?"
    ids = tokenizer.encode(text)
    assert ids[0] == tiny_models.BOS
    assert tokenizer.decode(ids, starts_text=True) == text
    text = render_chat(tokenizer.chat_template, [{"role": "user", "content": "hi"}], bos_token=tokenizer.bos_token)
    chat = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(chat, skip_special=False) == "<s> user: hi assistant:"


def test_weights_can_be_written_in_half_precision(tmp_path: Path) -> None:
    folder = tiny_models.write_hf_folder("llama_mqa", tmp_path, dtype="float16")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {np.dtype("float16")}


@pytest.fixture(scope="module")
def smollm2() -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    prompts = json.loads((HERE / "smollm2_135m.json").read_text(encoding="utf-8"))["prompts"]
    with np.load(HERE / "smollm2_135m.npz") as file:
        return prompts, dict(file)


def test_smollm2_is_of_these_prompts(smollm2: tuple[list[dict[str, Any]], dict[str, np.ndarray]]) -> None:
    entries, arrays = smollm2
    assert [entry["name"] for entry in entries] == [prompt.name for prompt in smollm2_prompts.PROMPTS]
    assert len(entries) >= 16
    for entry, prompt in zip(entries, smollm2_prompts.PROMPTS, strict=True):
        if prompt.messages is None:
            assert entry["text"] == prompt.text
        else:
            assert entry["messages"] == list(prompt.messages)
    full = {f"logits.{prompt.name}" for prompt in smollm2_prompts.PROMPTS if prompt.full_logits}
    assert {name for name in arrays if "." in name} == full


def test_smollm2_ids_and_logits_agree(smollm2: tuple[list[dict[str, Any]], dict[str, np.ndarray]]) -> None:
    entries, arrays = smollm2
    top_ids, top_logits, gaps = arrays["top_ids"], arrays["top_logits"], arrays["gaps"]
    assert top_ids.shape == top_logits.shape == (len(entries), 48, 8)
    np.testing.assert_array_equal(top_ids[:, :, 0], [entry["output_ids"] for entry in entries])
    np.testing.assert_array_equal(gaps, top_logits[:, :, 0] - top_logits[:, :, 1])
    assert (gaps > 1e-3).all()  # no prompt whose greedy answer another order of summation could change
    for number, entry in enumerate(entries):
        logits = arrays.get(f"logits.{entry['name']}")
        if logits is not None:
            assert logits.shape == (49152,)
            np.testing.assert_array_equal(logits[top_ids[number, 0]], top_logits[number, 0])


def test_golden_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in HERE.iterdir() if file.suffix in (".json", ".npz")) < 3_000_000
