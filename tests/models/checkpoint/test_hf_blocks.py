"""Folders of Hugging Face in few bits, packed here by hand as their formats say, are the numbers they hold."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.blocks import QuantFormat, blocks_of
from nitsum_jax.models.checkpoint.hf_blocks import QuantisedFolder
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.loading import open_model
from tests.models.checkpoint.helpers import random_tensors, tiny_config, write_hf

OUTPUTS, INPUTS, GROUP = 16, 64, 32
RNG = np.random.default_rng(5)
NUMBERS = RNG.integers(0, 16, (OUTPUTS, INPUTS)).astype(np.int64)
ZEROS = RNG.integers(1, 16, (OUTPUTS, INPUTS // GROUP)).astype(np.int64)
SCALES = RNG.uniform(0.01, 0.1, (OUTPUTS, INPUTS // GROUP)).astype(np.float16)


def words(numbers: np.ndarray, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> np.ndarray:
    """Eight numbers of 4 bits per i32 along the last axis; half byte i holds number order[i] of the eight."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8)
    packed = sum(eights[..., number] << (4 * place) for place, number in enumerate(order))
    return np.asarray(packed).astype(np.uint32).view(np.int32)


def folder(path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> QuantisedFolder:
    path.mkdir()
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path / "model.safetensors")
    return QuantisedFolder(SafetensorsSource(path), config)


def gptq(*, later: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tensors = {
        "x.qweight": words(NUMBERS).T,
        "x.qzeros": words((ZEROS - (0 if later else 1)).T),
        "x.scales": SCALES.T,
        "x.g_idx": (np.arange(INPUTS) // GROUP).astype(np.int32),
    }
    more = {"checkpoint_format": "gptq_v2"} if later else {}
    return tensors, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, **more}


def awq() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"x.qweight": words(NUMBERS.T, order), "x.qzeros": words(ZEROS.T, order), "x.scales": SCALES.T}
    return tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}


def scheme(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "awq"])
def test_words_with_zero_points(tmp_path: Path, kind: str) -> None:
    tensors, config = awq() if kind == "awq" else gptq(later=kind == "gptq_v2")
    source = folder(tmp_path / kind, tensors | {"norm.weight": np.ones(4, np.float32)}, config)
    wide = SCALES.astype(np.float64).repeat(GROUP, axis=1) * (NUMBERS - ZEROS.repeat(GROUP, axis=1))
    assert set(source.names()) == {"x.weight", "norm.weight"}
    assert source.shape("x.weight") == (OUTPUTS, INPUTS)
    assert source.block_format("x.weight") == QuantFormat(4, GROUP, True)
    assert source.block_format("norm.weight") is None
    np.testing.assert_allclose(source.read("x.weight"), wide, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(source.read_rows("x.weight", 3, 7), source.read("x.weight")[3:7])
    np.testing.assert_array_equal(source.read_columns("x.weight", 8, 40), source.read("x.weight")[:, 8:40])


def test_compressed_tensors_in_four_bits(tmp_path: Path) -> None:
    scales = SCALES.astype(ml_dtypes.bfloat16)
    tensors = {
        "x.weight_packed": words(NUMBERS),
        "x.weight_scale": scales,
        "x.weight_shape": np.array([OUTPUTS, INPUTS], np.int64),
    }
    source = folder(tmp_path / "m", tensors, scheme("pack-quantized", num_bits=4, strategy="group", group_size=GROUP))
    wide = (NUMBERS - 8) * scales.astype(np.float64).repeat(GROUP, axis=1)
    assert source.block_format("x.weight") == QuantFormat(4, GROUP)
    np.testing.assert_allclose(source.read("x.weight"), wide, rtol=1e-6)


def test_compressed_tensors_in_eight_bits(tmp_path: Path) -> None:
    numbers, scales = (NUMBERS * 17 - 128).astype(np.int8), SCALES[:, :1].astype(np.float32)
    tensors: dict[str, np.ndarray] = {
        "x.weight": numbers,
        "x.weight_scale": scales,
        "y.weight": np.ones((2, 2), np.float32),
    }
    source = folder(tmp_path / "m", tensors, scheme("int-quantized", num_bits=8, strategy="channel"))
    assert source.block_format("x.weight") == QuantFormat(8)
    assert source.block_format("y.weight") is None
    np.testing.assert_allclose(source.read("x.weight"), numbers * scales.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "fp8"}, "quant_method=fp8.*compressed-tensors, gptq, awq"),
        (gptq()[1] | {"bits": 3}, "bits=3.*full precision"),
        (gptq()[1] | {"desc_act": True}, "desc_act=true.*full precision"),
        (awq()[1] | {"version": "gemv"}, "version=gemv.*gemm"),
        (scheme("float-quantized", num_bits=8, type="float"), "type float.*no step multiplies"),
        (scheme("pack-quantized", num_bits=4, symmetric=False), "zero points"),
        (scheme("pack-quantized", num_bits=4, strategy="group", actorder="group"), "actorder=group"),
        (scheme("pack-quantized", num_bits=2, strategy="group"), "num_bits=2"),
        ({"quant_method": "compressed-tensors"}, "0 config_groups"),
    ],
)
def test_what_is_not_supported_is_said_in_a_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        folder(tmp_path / "m", {"y": np.ones(2, np.float32)}, config)


def test_tensors_that_do_not_fit_each_other_are_damage(tmp_path: Path) -> None:
    tensors, config = gptq()
    with pytest.raises(InvalidInputError, match="do not fit"):
        folder(tmp_path / "m", tensors | {"x.scales": SCALES.T[:, :-1], "x.qzeros": tensors["x.qzeros"][:, :1]}, config)
    with pytest.raises(InvalidInputError, match="no order"):
        folder(tmp_path / "n", tensors | {"x.g_idx": tensors["x.g_idx"][::-1]}, config).read("x.weight")


def test_a_model_of_such_a_folder_is_opened_and_stays_in_its_bits(tmp_path: Path) -> None:
    config = tiny_config(num_heads=4, num_kv_heads=4)
    tensors = random_tensors(config)
    write_hf(tmp_path, config, tensors)
    kept: dict[str, np.ndarray] = {}
    wide: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if value.ndim == 1 or "proj" not in name:
            kept[name] = value
            continue
        scales = np.abs(value).max(axis=1, keepdims=True) / 127
        kept[name] = np.rint(value / scales).astype(np.int8)
        kept[name + "_scale"] = scales.astype(np.float32)
        wide[name] = kept[name].astype(np.float32) * kept[name + "_scale"]
    for old in tmp_path.glob("*.safetensors*"):
        old.unlink()
    save_file(kept, tmp_path / "model.safetensors")
    path = tmp_path / "config.json"
    said = json.loads(path.read_text()) | {
        "quantization_config": scheme("int-quantized", num_bits=8, strategy="channel")
    }
    path.write_text(json.dumps(said))
    model = open_model(str(tmp_path))
    cut = ModelCut.of(model.config, 2)
    formats = model.formats("auto", cut)
    assert set(formats) == {
        f"layers.{i}.{m}" for i in (0, 1) for m in ("attn.qkv", "attn.out", "mlp.gate_up", "mlp.down")
    }
    found = {(name, k): value for name, k, value in model.weights(cut, "float32", formats)}
    down = blocks_of({leaf: found[f"layers.1.mlp.down.{leaf}", 1] for leaf in ("values", "scales")}, QuantFormat(8))
    half = config.d_mlp // 2
    np.testing.assert_array_equal(down.values(centred=False), wide["model.layers.1.mlp.down_proj.weight"][:, half:])
    plain = {(name, k): value for name, k, value in model.weights(cut, "float32")}
    np.testing.assert_array_equal(
        plain["layers.1.mlp.down", 1], wide["model.layers.1.mlp.down_proj.weight"][:, half:].T
    )
