"""Tensors that are left over, doubled, or not where the index says: refused by name, unless they change nothing."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.checkpoint.gguf_source import GgufSource
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource
from nitsum_jax.models.convert import convert
from nitsum_jax.models.loading import open_model
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf, write_hf

CONFIG = tiny_config()
TIED = dataclasses.replace(CONFIG, tied_head=True)
TENSORS = random_tensors(CONFIG)
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("form", ["hf", "gguf", "orbax"])
def test_a_layer_more_than_the_config_says(tmp_path: Path, form: str) -> None:
    fewer = dataclasses.replace(CONFIG, num_layers=1)
    if form == "gguf":
        write_gguf(tmp_path / "m.gguf", fewer, TENSORS)
        spec, message = (
            "m.gguf",
            r"tensor 'model\.layers\.1\.\S*' .and 8 more. has no place in a llama model of 1 layers",
        )
    else:
        write_hf(tmp_path / "hf", CONFIG, TENSORS)
        convert(str(tmp_path / "hf"), str(tmp_path / "orbax"), "orbax", vshards=2)
        config = json.loads((tmp_path / form / "config.json").read_text())
        (tmp_path / form / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
        spec, message = form, r"tensor 'model\.layers\.1\.\S*' .and 8 more. has no place in a llama model of 1 layers"
        if form == "orbax":
            message = r"parameter 'layers\.1\.attn\.norm\.all', which its config has no place for"
    with pytest.raises(InvalidInputError, match=message):
        open_model(str(tmp_path / spec))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.mlp.gate_proj.weight_scale",
        "score.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq.other",
    ],
)
def test_what_the_architecture_does_not_have(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path, CONFIG, TENSORS | {name: np.ones(8, np.float32)})
    with pytest.raises(InvalidInputError, match=rf"checkpoint tensor '{name}' has no place"):
        open_model(str(tmp_path))


def test_rotary_frequencies_pass(tmp_path: Path) -> None:
    inv_freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
    write_hf(tmp_path / "hf", CONFIG, TENSORS | inv_freq | {"model.rotary_emb.inv_freq": np.ones(4, np.float32)})
    assert open_model(str(tmp_path / "hf")).config.num_layers == 2
    write_gguf(tmp_path / "m.gguf", CONFIG, TENSORS, rope_freqs=np.ones(4))
    assert open_model(str(tmp_path / "m.gguf")).config.num_layers == 2


def test_fewer_layers_on_purpose_are_no_leftovers(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, TENSORS)
    assert open_model(str(tmp_path)).with_layers(1).config.num_layers == 1


def test_a_copy_of_the_embedding_as_head_is_tied(tmp_path: Path) -> None:
    write_hf(tmp_path, TIED, TENSORS | {HEAD: TENSORS[EMBED]})
    assert open_model(str(tmp_path)).config.tied_head


def test_another_head_than_the_embedding_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = TENSORS[EMBED].copy()
    head[-1, -1] += 1
    write_hf(tmp_path / "m", TIED, TENSORS | {HEAD: head})
    model = open_model(str(tmp_path / "m"))
    assert not model.config.tied_head
    np.testing.assert_array_equal(model.source.read(HEAD), head)
    assert "two that differ" in caplog.text
    write_hf(tmp_path / "n", TIED, TENSORS | {HEAD: head[:-1]})
    with pytest.raises(InvalidInputError, match=r"'lm_head\.weight' has shape \[299, 32\]"):
        open_model(str(tmp_path / "n"))


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    write_hf(tmp_path, CONFIG, {name: value for name, value in TENSORS.items() if name != HEAD})
    with pytest.raises(InvalidInputError, match=r"no tensor 'lm_head\.weight'"):
        open_model(str(tmp_path))


def save(path: Path, *names: str) -> None:
    safetensors.numpy.save_file({name: np.zeros(2, np.float32) for name in names}, path)


Damage = Callable[[Path, dict[str, str]], Any]


def add(file: str, name: str) -> Damage:
    """Puts one more tensor into a file, without a word in the index."""

    def damage(folder: Path, _: dict[str, str]) -> None:
        held = safetensors.numpy.load_file(folder / file)
        safetensors.numpy.save_file(held | {name: np.zeros(4, np.float32)}, folder / file)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _, index: index.update({NORM: SECOND if index[NORM] == FIRST else FIRST}), f"'{NORM}' is in .*lacks"),
        (lambda _, index: index.update(nowhere=FIRST), "'nowhere' is in model-00001.*, which lacks it"),
        (lambda _, index: index.pop(NORM), f"'{NORM}' is in .*, but not in {INDEX}"),
        (lambda folder, _: [add(file, "twice")(folder, {}) for file in (FIRST, SECOND)], "'twice' is both in"),
        (add(FIRST, "extra"), "'extra' is in model-00001.*, but not in"),
        (lambda folder, _: (folder / SECOND).rename(folder / "other.safetensors"), f"{SECOND}: it is missing"),
        (lambda folder, _: save(folder / "model.safetensors", "x"), "remove the one"),
    ],
)
def test_index_and_files_have_to_agree(tmp_path: Path, damage: Damage, message: str) -> None:
    folder = write_hf(tmp_path, CONFIG, TENSORS, files=2)
    index = json.loads((folder / INDEX).read_text())
    damage(folder, index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InvalidInputError, match=message) as error:
        SafetensorsSource(folder)
    assert "\n" not in str(error.value)


def test_an_index_that_names_a_tensor_twice(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, CONFIG, TENSORS, files=2)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}", '))
    with pytest.raises(InvalidInputError, match=rf"names '{NORM}' twice"):
        SafetensorsSource(folder)


def test_rotary_frequencies_need_no_index(tmp_path: Path) -> None:
    folder = write_hf(tmp_path, CONFIG, TENSORS, files=2)
    add(SECOND, "model.rotary_emb.inv_freq")(folder, {})
    assert open_model(str(folder)).config.num_layers == 2


def test_without_an_index_no_tensor_may_be_in_two_files(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "x", "y")
    save(tmp_path / "b.safetensors", "y", "z")
    with pytest.raises(InvalidInputError, match=r"'y' is both in a\.safetensors and in b\.safetensors"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"blk.0.attn_k.weight", b"blk.0.attn_v.weight", r"tensor 'blk\.0\.attn_v\.weight' twice"),
        (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.bos_token_id", r"key 'tokenizer\.ggml\.bos_token_id' twice"),
    ],
)
def test_gguf_says_nothing_twice(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, TENSORS)
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(InvalidInputError, match=message):
        GgufFile(path)


def test_gguf_tensor_under_both_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, TENSORS)
    file = GgufFile(path)
    first = file.tensors[0]
    file.tensors.append(dataclasses.replace(first, name="model.embed_tokens.weight"))
    with pytest.raises(InvalidInputError, match=r"'model\.embed_tokens\.weight' twice"):
        GgufSource(file, CONFIG)
