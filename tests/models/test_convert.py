import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.convert import convert
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.generation import GenerationDefaults, generation_defaults
from nitsum_jax.models.layers.rope_scaling import RopeScaling
from nitsum_jax.models.loading import open_model
from nitsum_jax.models.pack import pack
from tests.models.checkpoint.helpers import CHAT_TEMPLATE, DictSource, random_tensors, tiny_config, write_gguf, write_hf


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_there_and_back(tmp_path: Path, architecture: str) -> None:
    """Hugging Face -> Orbax -> Hugging Face gives the same tensors, config and tokenizer."""
    config = tiny_config(
        architecture=architecture, num_heads=8, num_kv_heads=2, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    )
    tensors = random_tensors(config)
    first, middle, last = (str(tmp_path / name) for name in ("first", "middle", "last"))
    write_hf(Path(first), config, tensors)
    convert(first, middle, "orbax", vshards=4)
    convert(middle, last, "safetensors")
    model = open_model(last)
    assert model.config == open_model(first).config.__class__(
        **{field: getattr(config, field) for field in config.__slots__} | {"name": "last"}
    )
    assert sorted(model.source.names()) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(model.source.read(name), value)
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert model.tokenizer.encode("a b") == open_model(first).tokenizer.encode("a b")


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
def test_how_the_model_is_sampled_goes_along(tmp_path: Path, to: str) -> None:
    config = tiny_config()
    source = write_hf(tmp_path / "m", config, random_tensors(config))
    file = source / "generation_config.json"
    ends = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**ends, "do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    convert(str(source), str(tmp_path / "out"), to)
    before, after = open_model(str(source)), open_model(str(tmp_path / "out"))
    assert generation_defaults(after.generation, 99) == GenerationDefaults(temperature=0.6, top_p=0.9)
    assert after.config.eos_ids == before.config.eos_ids


@pytest.mark.parametrize("to", ["orbax", "safetensors"])
@pytest.mark.parametrize(("dtype", "written"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_gguf_is_dequantised(tmp_path: Path, to: str, dtype: str, written: str) -> None:
    config = tiny_config()
    path = tmp_path / "m.gguf"
    stored = write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType.Q4_1)
    convert(str(path), str(tmp_path / "out"), to, vshards=2, dtype=dtype)
    model = open_model(str(tmp_path / "out"))
    assert model.config.dtype == written
    cut = ModelCut.of(config, 2)
    for a, b in zip(model.weights(cut, written), pack(config, cut, DictSource(stored), written), strict=True):
        if a[2].ndim > 1:
            np.testing.assert_array_equal(a[2], b[2])
    before, after = open_model(str(path)).tokenizer, model.tokenizer
    assert (after.eos_ids, after.bos_id, after.chat_template) == (before.eos_ids, before.bos_id, before.chat_template)
    assert after.encode("Hello </s> hello") == before.encode("Hello </s> hello")


def test_bad_arguments(tmp_path: Path) -> None:
    config = tiny_config()
    source = str(write_hf(tmp_path / "m", config, random_tensors(config)))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, options, message in (
        ((source, str(tmp_path / "full"), "orbax"), {}, "not an empty folder"),
        ((source, str(tmp_path / "full" / "file"), "orbax"), {}, "not an empty folder"),
        ((source, str(tmp_path / "new"), "gguf"), {}, "use orbax or safetensors"),
        ((source, str(tmp_path / "new"), "orbax"), {"vshards": 3}, "power of two"),
        ((source, str(tmp_path / "new"), "orbax"), {"dtype": "int8"}, "int8"),
        ((str(tmp_path / "none"), str(tmp_path / "new"), "orbax"), {}, "there is no model"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            convert(*arguments, **options)
    assert not (tmp_path / "new").exists()  # nothing is left of a conversion that could not start


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nitsum_jax.models.convert", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    config = tiny_config()
    source = str(write_hf(tmp_path / "m", config, random_tensors(config)))
    done = _command(source, str(tmp_path / "out"), "--to=orbax", "--vshards=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    vshards = open_model(str(tmp_path / "out")).vshards
    assert vshards is not None
    assert vshards.cut.num_vshards == 2
    again = _command(source, str(tmp_path / "out"), "--to=orbax")
    assert again.returncode == 1
    assert again.stderr == f"nitsum-convert: {tmp_path / 'out'} is not an empty folder: give the name of a new one\n"
