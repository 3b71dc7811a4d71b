from typing import Any

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.families.tensors import checkpoint_shapes
from nitsum_jax.models.pack import cut_bytes, matrix_dtype, pack, plan, unpack
from tests.models.checkpoint.helpers import DictSource, bf16, random_tensors, tiny_config

VARIANTS: list[dict[str, Any]] = [
    {"architecture": "llama", "tied_head": True},
    {"architecture": "mistral"},
    {"architecture": "qwen2", "num_heads": 14, "num_kv_heads": 2},
    {"architecture": "qwen3", "head_dim": 16, "d_mlp": 37, "vocab_size": 301},
]


@pytest.mark.parametrize("num_vshards", [1, 2, 4, 8])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v["architecture"]))
def test_unpack_gives_back_what_was_packed(variant: dict[str, Any], num_vshards: int) -> None:
    config = tiny_config(**variant)
    cut, tensors = ModelCut.of(config, num_vshards), random_tensors(config)
    packed = {(name, k): value for name, k, value in pack(config, cut, DictSource(tensors), "float32")}
    back = dict(unpack(config, cut, lambda name, k: packed[name, k]))
    assert list(back) == list(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: str(v["architecture"]))
def test_shapes_and_dtypes_are_those_announced(variant: dict[str, Any]) -> None:
    config = tiny_config(**variant)
    cut = ModelCut.of(config, 4)
    announced = {one.name: one for one in plan(config, cut) if not one.vshard}
    seen: dict[str, list[int | None]] = {}
    sizes = {None: 0, 0: 0, 1: 0, 2: 0, 3: 0}
    for name, vshard, value in pack(config, cut, DictSource(random_tensors(config)), "bfloat16"):
        assert value.shape == announced[name].shape
        assert value.dtype == (np.float32 if value.ndim == 1 else ml_dtypes.bfloat16)
        assert value.flags.c_contiguous
        assert value.flags.owndata
        seen.setdefault(name, []).append(vshard)
        sizes[vshard] += value.nbytes
    assert list(seen) == list(announced)
    for name, vshards in seen.items():
        assert vshards == ([None] if announced[name].vshard is None else [0, 1, 2, 3])
    assert cut_bytes(config, cut, "bfloat16") == (sizes[0], sizes[None])
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]


def test_rows_are_q_then_k_then_v_and_padding_is_zero() -> None:
    config = tiny_config(num_heads=6, num_kv_heads=3, head_dim=8)
    cut, tensors = ModelCut.of(config, 4), random_tensors(config)
    packed = {(name, k): value for name, k, value in pack(config, cut, DictSource(tensors), "float32")}
    prefix = "model.layers.1.self_attn"
    q, k, v = (tensors[f"{prefix}.{x}_proj.weight"] for x in "qkv")
    np.testing.assert_array_equal(packed["layers.1.attn.qkv", 1], np.concatenate([q[16:32], k[8:16], v[8:16]]))
    np.testing.assert_array_equal(packed["layers.1.attn.qkv", 2], np.concatenate([q[32:48], k[16:24], v[16:24]]))
    np.testing.assert_array_equal(packed["layers.1.attn.out", 1], tensors[f"{prefix}.o_proj.weight"][:, 16:32].T)
    assert not packed["layers.1.attn.qkv", 3].any()
    assert not packed["layers.1.attn.out", 3].any()


def test_gate_comes_before_up_and_down_is_transposed() -> None:
    config = tiny_config(d_mlp=10)
    cut, tensors = ModelCut.of(config, 4), random_tensors(config)
    packed = {(name, k): value for name, k, value in pack(config, cut, DictSource(tensors), "float32")}
    gate, up, down = (tensors[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
    value = packed["layers.0.mlp.gate_up", 3]  # columns 9 and one of padding
    np.testing.assert_array_equal(value[[0, 3]], np.stack([gate[9], up[9]]))
    assert not value[[1, 2, 4, 5]].any()
    np.testing.assert_array_equal(packed["layers.0.mlp.down", 1], down[:, 3:6].T)


def test_bfloat16_is_the_rounded_float32() -> None:
    config = tiny_config()
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in checkpoint_shapes(config).items()}
    cut = ModelCut.of(config, 2)
    for low, full in zip(
        pack(config, cut, DictSource(tensors), "bfloat16"),
        pack(config, cut, DictSource(tensors), "float32"),
        strict=True,
    ):
        np.testing.assert_array_equal(low[2], bf16(full[2]) if full[2].ndim > 1 else full[2])


@pytest.mark.parametrize("num_vshards", [1, 4])
def test_every_element_is_read_once_and_never_a_whole_table(num_vshards: int) -> None:
    config = tiny_config(architecture="qwen2", num_heads=8, num_kv_heads=4)
    source = DictSource(random_tensors(config))
    for _ in pack(config, ModelCut.of(config, num_vshards), source, "float32"):
        pass
    assert source.read_elements == {name: value.size for name, value in source.tensors.items()}
    assert source.largest_read == source.tensors["lm_head.weight"].nbytes // num_vshards


@hypothesis.given(
    groups=st.integers(1, 5), ratio=st.integers(1, 5), log_vshards=st.integers(0, 3), d_mlp=st.integers(1, 20)
)
def test_the_sum_over_vshards_is_the_whole_layer(groups: int, ratio: int, log_vshards: int, d_mlp: int) -> None:
    """Both projections of the MLP, and v followed by the output projection, which tells q heads and v heads apart."""
    config = tiny_config(
        num_layers=1, num_heads=groups * ratio, num_kv_heads=groups, d_model=6, head_dim=4, d_mlp=d_mlp
    )
    cut, tensors = ModelCut.of(config, 2**log_vshards), random_tensors(config)
    packed = {(name, k): value for name, k, value in pack(config, cut, DictSource(tensors), "float32")}
    x = np.random.default_rng(1).normal(size=6)
    mlp = "model.layers.0.mlp"
    gate, up, down = (tensors[f"{mlp}.{which}_proj.weight"] for which in ("gate", "up", "down"))
    v = (tensors["model.layers.0.self_attn.v_proj.weight"] @ x).reshape(groups, 4)
    whole = down @ (np.tanh(gate @ x) * (up @ x))
    whole += tensors["model.layers.0.self_attn.o_proj.weight"] @ np.repeat(v, ratio, axis=0).reshape(-1)
    total = np.zeros(6)
    for k in range(cut.num_vshards):
        hidden = packed["layers.0.mlp.gate_up", k] @ x
        total += (np.tanh(hidden[: cut.d_mlp]) * hidden[cut.d_mlp :]) @ packed["layers.0.mlp.down", k]
        part = packed["layers.0.attn.qkv", k][(cut.q_heads + cut.kv_heads) * 4 :] @ x
        heads = np.repeat(part.reshape(cut.kv_heads, 4), cut.q_heads // cut.kv_heads, axis=0)
        total += heads.reshape(-1) @ packed["layers.0.attn.out", k]
    np.testing.assert_allclose(total, whole, rtol=1e-9, atol=1e-9)


def test_a_tensor_of_another_shape_is_an_error() -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    with pytest.raises(InvalidInputError, match=r"'model.norm.weight' has shape \[31\] but the config says \[32\]"):
        next(pack(config, ModelCut.of(config, 2), DictSource(tensors), "float32"))


def test_unknown_dtype() -> None:
    with pytest.raises(InvalidInputError, match="int8"):
        matrix_dtype("int8")
