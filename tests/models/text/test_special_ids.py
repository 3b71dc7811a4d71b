"""What files say of the ids that begin and end a text, and how they say that there is none."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.config_readers.hf import config_from_hf, config_to_hf
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.text.special_ids import MAX_END_IDS, ids_of_gguf, ids_of_json, valid_ids
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_gguf, write_hf

CONFIG = tiny_config()
TENSORS = random_tensors(CONFIG)
NONE_VALUES = [None, -1, 2**32 - 1, 2**64 - 1, [], [None, -1]]


@pytest.mark.parametrize("none", NONE_VALUES, ids=str)
def test_values_that_mean_none(none: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert ids_of_json({"bos_token_id": none, "eos_token_id": none}, 300, "config.json") == ids_of_json({}, 300, "")
    assert ids_of_json({}, 300, "").bos is None
    assert ids_of_gguf(lambda _: none, 300).ends == ()
    assert not caplog.records


@given(st.lists(st.integers(-5, 400), max_size=20))
def test_of_a_list_the_ids_of_the_vocabulary_stay_in_order(ids: list[int]) -> None:
    assert valid_ids(ids, 300, "key", warn=False) == tuple(dict.fromkeys(i for i in ids if 0 <= i < 300))


def test_an_id_beyond_the_vocabulary_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert ids_of_json({"eos_token_id": [2, 300]}, 300, "config.json").ends == (2,)
    assert "eos_token_id of config.json names token 300, but the vocabulary has 300" in caplog.text


@pytest.mark.parametrize("wrong", ["</s>", True, 2.0, [[2]]])
def test_what_is_no_id_is_refused(wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"eos_token_id of config\.json is .* wrong kind"):
        ids_of_json({"eos_token_id": wrong}, 300, "config.json")


def test_more_ends_than_a_request_takes_are_refused() -> None:
    assert len(valid_ids(list(range(MAX_END_IDS)), 300, "key")) == MAX_END_IDS
    with pytest.raises(InvalidInputError, match="key names 65 tokens"):
        valid_ids(list(range(MAX_END_IDS + 1)), 300, "key")


def test_gguf_ends_are_those_of_texts_turns_and_messages() -> None:
    fields = {"bos": 1, "eos": 2, "eot": [7, 8], "eom": 2}
    special = ids_of_gguf(lambda key: fields[key.split(".")[-1].removesuffix("_token_id")], 300)
    assert (special.bos, special.ends) == (1, (2, 7, 8))


def gguf_model(path: Path, **ids: int) -> OpenModel:
    fields = {f"tokenizer.ggml.{kind}_token_id": value for kind, value in ids.items()}
    write_gguf(path / "m.gguf", CONFIG, TENSORS, fields=fields)
    return open_model(str(path / "m.gguf"))


@pytest.mark.parametrize("none", [2**32 - 1, 5000])
def test_a_gguf_model_has_only_ends_that_it_can_say(tmp_path: Path, none: int) -> None:
    model = gguf_model(tmp_path, eot=none, eom=7)
    assert model.config.eos_ids == (2, 7)
    assert model.tokenizer.eos_ids == (2, 7)


def hf_model(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> OpenModel:
    write_hf(folder, CONFIG, TENSORS)
    (folder / "config.json").write_text(json.dumps(config_to_hf(CONFIG) | config))
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return open_model(str(folder))


@pytest.mark.parametrize("none", [None, -1, 2**32 - 1, 5000, [5000, -1]], ids=str)
def test_a_folder_whose_configs_name_no_end_keeps_that_of_the_tokenizer(tmp_path: Path, none: Any) -> None:
    ids = {"eos_token_id": none, "bos_token_id": none}
    model = hf_model(tmp_path, ids, ids)
    assert model.config.eos_ids == (2,)
    assert model.tokenizer.eos_ids == (2,)
    assert model.config.bos_id is None


def test_ends_of_all_files_are_joined(tmp_path: Path) -> None:
    assert set(hf_model(tmp_path, {"eos_token_id": [7, 8]}, {"eos_token_id": [8, 9]}).config.eos_ids) == {2, 7, 8, 9}


def test_a_token_that_is_spelled_but_not_there_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_hf(tmp_path, CONFIG, TENSORS)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>", "bos_token": ""}))
    model = open_model(str(tmp_path))
    assert model.tokenizer.bos_id is None
    assert "eos_token of tokenizer_config.json is '<nowhere>', which the tokenizer lacks" in caplog.text


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = dataclasses.replace(CONFIG, vocab_size=200, eos_ids=())
    write_gguf(tmp_path / "m.gguf", small, random_tensors(small), fields={"tokenizer.ggml.eot_token_id": 230})
    assert open_model(str(tmp_path / "m.gguf")).config.eos_ids == (2,)
    assert "the tokenizer has 260 tokens but the model 200" in caplog.text
    starts = {"tokenizer.ggml.add_bos_token": True}
    tiny = dataclasses.replace(CONFIG, vocab_size=1, eos_ids=())
    write_gguf(tmp_path / "n.gguf", tiny, random_tensors(tiny), fields=starts)
    with pytest.raises(InvalidInputError, match="starts every text with token 1, but the model knows 1 tokens only"):
        open_model(str(tmp_path / "n.gguf"))


def test_no_end_is_written_as_null() -> None:
    written = config_to_hf(dataclasses.replace(CONFIG, eos_ids=(), bos_id=None))
    assert (written["eos_token_id"], written["bos_token_id"]) == (None, None)
    assert config_from_hf(written).eos_ids == ()
