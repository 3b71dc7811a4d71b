import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models import loading
from nitsum_jax.models.convert import convert
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.known.registry import KnownModel
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.pack import pack
from tests.models.checkpoint.helpers import CHAT_TEMPLATE, DictSource, random_tensors, tiny_config, write_gguf, write_hf

CONFIG = tiny_config()
TENSORS = random_tensors(CONFIG)
FORMS = ["gguf", "hf", "orbax"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    write_gguf(folder / "tiny.gguf", CONFIG, TENSORS)
    write_hf(folder / "tiny-hf", CONFIG, TENSORS, files=2)
    convert(str(folder / "tiny-hf"), str(folder / "tiny-orbax"), "orbax", vshards=4)
    return {"gguf": str(folder / "tiny.gguf"), "hf": str(folder / "tiny-hf"), "orbax": str(folder / "tiny-orbax")}


def check(model: OpenModel, num_vshards: int, dtype: str = "float32") -> None:
    cut = ModelCut.of(model.config, num_vshards)
    for a, b in zip(model.weights(cut, dtype), pack(CONFIG, cut, DictSource(TENSORS), dtype), strict=True):
        assert a[:2] == b[:2]
        assert a[2].dtype == b[2].dtype
        np.testing.assert_array_equal(a[2], b[2])


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_same_model(models: dict[str, str], form: str) -> None:
    model = open_model(models[form])
    assert model.name == {"gguf": "tiny", "hf": "tiny-hf", "orbax": "tiny-orbax"}[form]
    assert dataclasses.replace(model.config, name="tiny") == CONFIG
    assert model.tokenizer.decode(model.tokenizer.encode("Hello, world", add_special=False)) == "Hello, world"
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert model.tokenizer.eos_ids == (2,)
    check(model, 4)
    check(model, 2, "bfloat16")


@pytest.mark.parametrize("num_vshards", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_place_puts_every_vshard_on_its_devices(models: dict[str, str], form: str, num_vshards: int) -> None:
    model, devices = open_model(models[form]), jax.devices()[:3]
    cut = ModelCut.of(model.config, num_vshards)
    residency = {0: frozenset({0, 1}), 2: frozenset({1})}
    expected = {(name, k): value for name, k, value in pack(CONFIG, cut, DictSource(TENSORS), "float32")}
    seen = set()
    for name, k, device, value in model.place(cut, "float32", devices, residency):
        assert value.devices() == {devices[device]}
        np.testing.assert_array_equal(np.asarray(value), expected[name, k])
        seen.add((name, k, device))
    wanted = {(n, k, d) for n, k in expected for d, held in residency.items() if k is None or k in held}
    assert seen == wanted


def test_a_known_name_is_fetched(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownModel("small", "small==1", "small/small.gguf", 1, "", "Apache-2.0")
    monkeypatch.setitem(loading.KNOWN_MODELS, "small", known)
    fetched: list[KnownModel] = []

    def fetch(model: KnownModel) -> Path:
        fetched.append(model)
        return Path(models["gguf"])

    monkeypatch.setattr(loading, "fetch", fetch)
    assert open_model("small").name == "small"
    assert fetched == [known]


def test_end_ids_of_config_and_tokenizer_are_joined(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, eos_ids=(7,))
    write_hf(tmp_path / "m", config, TENSORS)
    assert set(open_model(str(tmp_path / "m")).config.eos_ids) == {2, 7}


@pytest.mark.parametrize("spec", ["gpt-5", "", "no/such/file.gguf"])
def test_unknown_spec_says_what_is_accepted(spec: str) -> None:
    with pytest.raises(InvalidInputError, match=r"smollm2-135m.*\.gguf file.*Hugging Face.*nitsum-convert") as error:
        open_model(spec)
    assert "\n" not in str(error.value)


def test_files_and_folders_that_are_no_model(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(InvalidInputError, match=r"not a \.gguf file"):
        open_model(str(tmp_path / "model.bin"))
    with pytest.raises(InvalidInputError, match="holds no model"):
        open_model(str(tmp_path))
    for missing, message in (("config.json", r"no config\.json"), ("tokenizer.json", r"tokenizer\.json")):
        shutil.copytree(models["hf"], tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(InvalidInputError, match=message):
            open_model(str(tmp_path / missing))
    shutil.copytree(models["hf"], tmp_path / "list")
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(InvalidInputError, match="not a JSON object"):
        open_model(str(tmp_path / "list"))


def test_missing_and_misshapen_tensors_are_found_when_opening(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_layers=3)
    write_gguf(tmp_path / "m.gguf", config, TENSORS)
    with pytest.raises(InvalidInputError, match=r"no tensor 'model\.layers\.2\."):
        open_model(str(tmp_path / "m.gguf"))
    write_hf(tmp_path / "m", CONFIG, TENSORS)
    config_json = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config_json | {"intermediate_size": 65}))
    with pytest.raises(InvalidInputError, match=r"has shape \[64, 32\] but the config says \[65, 32\]"):
        open_model(str(tmp_path / "m"))


def test_opening_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, TENSORS, quantised=gguf.GGMLQuantizationType.Q8_0)
    model = open_model(str(path))

    def refuse(*_: object) -> np.ndarray:
        raise AssertionError("read")

    monkeypatch.setattr(gguf.quants, "dequantize", refuse)
    assert open_model(str(path)).config == model.config
    with pytest.raises(AssertionError, match="read"):
        list(model.weights(ModelCut.of(model.config, 1), "float32"))
