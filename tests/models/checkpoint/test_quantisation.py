"""Which parameters are kept in few bits, what they take, and what does not fit."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import INT4, INT8, QuantFormat, blocks_of
from nitsum_jax.models.checkpoint.quantisation import check_quantization, choose_formats, described
from nitsum_jax.models.convert import convert
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.loading import open_model
from nitsum_jax.models.pack import cut_bytes, pack, row_parallel
from tests.models.checkpoint import quantised_model
from tests.models.checkpoint.helpers import DictSource, random_tensors, tiny_config, write_gguf

CONFIG = tiny_config(d_model=64, d_mlp=256, num_heads=8, num_kv_heads=4, head_dim=32)
MATRICES = ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp8", "no step multiplies float8 weights; use int8"),
        ("int3", "int3 is not known: give one of none, auto, int8"),
    ],
)
def test_unknown_quantisations_are_refused(name: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_quantization(name)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("vshards", [1, 2, 8])
def test_the_bytes_of_a_vshard_are_those_of_its_arrays(quantization: str, vshards: int) -> None:
    cut, source = ModelCut.of(CONFIG, vshards), DictSource(random_tensors(CONFIG))
    formats = choose_formats(quantization, CONFIG, cut, source)
    assert formats["embed.table"] == formats["head.table"] == INT8
    assert {formats[f"layers.0.{name}"] for name in MATRICES} == {INT8 if quantization == "int8" else INT4}
    sizes = {None: 0} | dict.fromkeys(range(vshards), 0)
    for _, vshard, value in pack(CONFIG, cut, source, "bfloat16", formats):
        sizes[vshard] += value.nbytes
    assert {sizes[k] for k in range(vshards)} == {cut_bytes(CONFIG, cut, "bfloat16", formats)[0]}
    assert sizes[None] == cut_bytes(CONFIG, cut, "bfloat16", formats)[1]


@pytest.mark.parametrize(("kind", "fmt"), [
    ("Q8_0", QuantFormat(8, 32, False, "float16")),
    ("Q4_0", QuantFormat(4, 32, False, "float16")),
    ("Q4_1", QuantFormat(4, 32, True, "float16")),
])  # fmt: skip
@pytest.mark.parametrize("vshards", [1, 8])
def test_a_gguf_file_keeps_its_own_bits(tmp_path: Path, kind: str, fmt: QuantFormat, vshards: int) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, CONFIG, random_tensors(CONFIG), quantised=gguf.GGMLQuantizationType[kind])
    model = open_model(str(path))
    cut = ModelCut.of(model.config, vshards)
    formats = model.formats("auto", cut)
    assert set(formats.values()) == {fmt}
    kept = {(name, k): value for name, k, value in model.weights(cut, "float32", formats)}
    for name, vshard, wide in model.weights(cut, "float32"):
        if name not in formats:
            np.testing.assert_array_equal(kept[name, vshard], wide)
            continue
        leaves = {leaf: kept[f"{name}.{leaf}", vshard] for leaf in fmt.leaves(32, 32)}
        values = blocks_of(leaves, fmt).values(centred=fmt.bits == 4)
        np.testing.assert_array_equal(values.T if name in row_parallel(model.config, cut) else values, wide)


@pytest.mark.parametrize("of_values", [QuantFormat(8, 16, False, "float32"), QuantFormat(4, 32, True, "float32")])
def test_vshards_of_padding_are_zeros_whatever_the_formats_of_the_rest(
    of_values: QuantFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in files of Q4_K_M: 4 bits with minimums for q and k, 8 without for some v; the fourth KV group is padding."""
    for name in ("q_proj", "k_proj"):
        monkeypatch.setitem(quantised_model.FORMATS, name, QuantFormat(4, 32, True, "float32"))
    monkeypatch.setitem(quantised_model.FORMATS, "v_proj", of_values)
    config = dataclasses.replace(quantised_model.CONFIG, num_heads=9, num_kv_heads=3)
    cut, source = ModelCut.of(config, 4), quantised_model.KeptSource(quantised_model.tensors(config))
    formats = choose_formats("auto", config, cut, source)
    kept = {(name, k): value for name, k, value in pack(config, cut, source, "float32", formats)}
    inputs_first = row_parallel(config, cut)
    for name, k, expected in pack(config, cut, source, "float32"):
        if name not in formats:
            continue
        fmt = formats[name]
        leaves = {leaf: kept[f"{name}.{leaf}", k] for leaf in fmt.leaves(32, 64)}
        found = blocks_of(leaves, fmt).values(centred=fmt.bits == 4)
        np.testing.assert_array_equal(found.T if name in inputs_first else found, expected)
        if k == 3 and name.endswith(("attn.qkv", "attn.out")):
            assert not expected.any()


def test_groups_shrink_where_vshards_cut_them_and_are_refused_where_they_would_vanish() -> None:
    config = tiny_config(d_model=64, d_mlp=192, num_heads=8, num_kv_heads=4, head_dim=32)
    source = DictSource(random_tensors(config))
    formats = choose_formats("int4", config, ModelCut.of(config, 4), source)  # 48 inputs of a vshard
    assert formats["layers.0.mlp.down"].group == 16
    assert formats["layers.0.attn.out"].group == 32
    with pytest.raises(InvalidInputError, match=r"layers.0.mlp.down.*24: use fewer --vshards, --quantization=int8"):
        choose_formats("int4", config, ModelCut.of(config, 8), source)
    assert choose_formats("int8", config, ModelCut.of(config, 8), source)


def test_what_is_quantised_here_is_said_with_its_loss(caplog: pytest.LogCaptureFixture) -> None:
    cut, source = ModelCut.of(CONFIG, 2), DictSource(random_tensors(CONFIG))
    said = {}
    for quantization in ("int8", "int4"):
        formats = choose_formats(quantization, CONFIG, cut, source)
        with caplog.at_level("INFO", "nitsum_jax.models.pack"):
            caplog.clear()
            for _ in pack(CONFIG, cut, source, "float32", formats):
                pass
        (line,) = caplog.messages
        said[quantization] = float(line.split("differ by ")[1].split(" %")[0])
        assert line.startswith(f"{len(formats)} parameters were quantised here")
    # Numbers spread evenly over [-1, 1] with steps of 2/254 and 2/15: step/sqrt(12) over 1/sqrt(3).
    assert said["int8"] == pytest.approx(100 / 254, rel=0.1)
    assert 100 / 15 * 0.7 < said["int4"] < 100 / 15 * 1.1
    assert described(choose_formats("int8", CONFIG, cut, source)) == "10 as int8 by output channels"


def test_an_orbax_checkpoint_keeps_quantised_vshards(tmp_path: Path) -> None:
    path, folder = tmp_path / "m.gguf", tmp_path / "orbax"
    stored = write_gguf(path, CONFIG, random_tensors(CONFIG), quantised=gguf.GGMLQuantizationType.Q4_1)
    convert(str(path), str(folder), "orbax", vshards=2, quantize="auto")
    original, converted = open_model(str(path)), open_model(str(folder))
    cut = ModelCut.of(CONFIG, 2)
    formats = original.formats("auto", cut)
    assert converted.formats("auto", cut) == formats
    for left, right in zip(
        converted.weights(cut, "float32", formats), original.weights(cut, "float32", formats), strict=True
    ):
        assert left[:2] == right[:2]
        assert left[2].dtype == right[2].dtype
        np.testing.assert_array_equal(left[2], right[2])
    # Widened, and for another number of vshards, it is what the file holds.
    for name, value in stored.items():
        np.testing.assert_array_equal(converted.source.read(name), value)
    assert converted.formats("none", ModelCut.of(CONFIG, 4)) == {}
    with pytest.raises(InvalidInputError, match="2 quantised vshards: give --vshards=2, --quantization=none"):
        converted.formats("auto", ModelCut.of(CONFIG, 4))
    with pytest.raises(InvalidInputError, match="quantised already"):
        converted.formats("int8", cut)
    with pytest.raises(InvalidInputError, match="--to=orbax"):
        convert(str(path), str(tmp_path / "hf"), "safetensors", quantize="int8")
