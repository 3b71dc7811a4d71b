"""How a model's files say what its embeddings are made of."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.convert import convert
from nitsum_jax.models.loading import open_model
from nitsum_jax.models.pooling import Pooling, chosen_pooling, pooling_of_gguf, read_pooling, write_pooling
from tests.models.golden import tiny_models

# As Qwen3-Embedding, all-MiniLM and later versions of sentence-transformers have them.
QWEN3_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
QWEN3_POOLING = {
    "word_embedding_dimension": 1024,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}
MEAN = QWEN3_POOLING | {"pooling_mode_lasttoken": False, "pooling_mode_mean_tokens": True}
DENSE = [*QWEN3_MODULES, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]


def write(folder: Path, modules: Any, pooling: Any) -> Path:
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (QWEN3_MODULES, QWEN3_POOLING, Pooling.LAST),
        (QWEN3_MODULES[:2], MEAN, Pooling.MEAN),
        (QWEN3_MODULES, {"embedding_dimension": 1024, "pooling_mode": "lasttoken"}, Pooling.LAST),
        (QWEN3_MODULES, {"pooling_mode": "mean"}, Pooling.MEAN),
        (QWEN3_MODULES, QWEN3_POOLING | {"pooling_mode_lasttoken": False, "pooling_mode_cls_token": True}, None),
        (QWEN3_MODULES, MEAN | {"pooling_mode_lasttoken": True}, None),  # both, side by side
        (DENSE, QWEN3_POOLING, None),  # a layer that is not there would be left out
        ({"not": "a list"}, QWEN3_POOLING, None),
    ],
)
def test_files_of_sentence_transformers(tmp_path: Path, modules: Any, pooling: Any, expected: Pooling | None) -> None:
    assert read_pooling(write(tmp_path / "model", modules, pooling)) is expected


def test_other_models_have_none_and_damaged_files_are_named(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    (tmp_path / "modules.json").write_text("[")
    with pytest.raises(InvalidInputError, match=r"cannot read .*modules\.json: .*; fetch the file again"):
        read_pooling(tmp_path)


@pytest.mark.parametrize(("value", "expected"), [(0, None), (1, Pooling.MEAN), (2, None), (3, Pooling.LAST), (4, None)])
def test_gguf_files(value: int, expected: Pooling | None) -> None:
    assert pooling_of_gguf(value) is expected


def test_a_flag_goes_before_the_files() -> None:
    assert chosen_pooling("auto", Pooling.LAST) is Pooling.LAST
    assert chosen_pooling("mean", Pooling.LAST) is Pooling.MEAN
    assert chosen_pooling("none", Pooling.LAST) is None


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_a_converted_model_keeps_it(tmp_path: Path, to: str) -> None:
    source = tiny_models.write_hf_folder("qwen3_tied", tmp_path / "source")
    write_pooling(source, Pooling.LAST)
    convert(str(source), str(tmp_path / "out"), to)
    assert open_model(str(tmp_path / "out")).pooling is Pooling.LAST


def test_a_model_that_was_saved_without_its_head_is_the_same(tmp_path: Path) -> None:
    source = tiny_models.write_hf_folder("qwen3_tied", tmp_path / "source")
    bare = tiny_models.write_hf_folder("qwen3_tied", tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in tensors.items()}, bare / "model.safetensors")
    first, second = open_model(str(source)), open_model(str(bare))
    assert set(first.source.names()) == set(second.source.names())
    for name in first.source.names():
        assert first.source.read(name).tobytes() == second.source.read(name).tobytes()
