from pathlib import Path

import gguf
import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.gguf_file import GgufFile
from nitsum_jax.models.checkpoint.gguf_source import GgufSource
from nitsum_jax.models.config_readers.gguf import config_from_gguf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import pack
from tests.models.checkpoint.helpers import DictSource, random_tensors, tiny_config, write_gguf

KINDS = ["F32", "F16", "BF16", "Q4_1", "Q8_0"]
Q = "model.layers.1.self_attn.q_proj.weight"
O = "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_layers=1, vocab_size=8)
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType.Q8_0)
    return path


def test_reads_what_the_gguf_package_reads(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType.Q4_1, fields={"x.y": 1.5})
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in ours.fields.items()} == expected
    assert len(ours.tensors) == len(theirs.tensors)
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.shape, a.tensor_type) == (b.name, tuple(b.shape.tolist()), b.tensor_type)
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_in_hugging_face_order(tmp_path: Path, architecture: str, kind: str) -> None:
    config = tiny_config(architecture=architecture, num_heads=8, num_kv_heads=4)
    path = tmp_path / "m.gguf"
    stored = write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType[kind])
    source = GgufSource(GgufFile(path), config)
    assert set(source.names()) == set(stored)
    for name, value in stored.items():
        assert source.shape(name) == value.shape
        np.testing.assert_array_equal(source.read(name).astype(np.float32), value)
    if kind in ("F32", "F16", "BF16"):  # exact formats: nothing but the order could differ from what was written
        for name, value in random_tensors(config).items():
            np.testing.assert_array_equal(source.read(name).astype(np.float32), value)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_parts_of_the_whole(tmp_path: Path, kind: str) -> None:
    config = tiny_config(d_mlp=96, num_heads=8, num_kv_heads=4)
    path = tmp_path / "m.gguf"
    write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType[kind])
    source = GgufSource(GgufFile(path), config)
    for name in (Q, O, DOWN):
        whole = source.read(name)
        for start, stop in ((0, 1), (3, 17), (8, 32), (31, 32)):
            np.testing.assert_array_equal(source.read_rows(name, start, stop), whole[start:stop])
            np.testing.assert_array_equal(source.read_columns(name, start, stop), whole[:, start:stop])
    np.testing.assert_array_equal(source.read_columns(DOWN, 40, 95), source.read(DOWN)[:, 40:95])


def test_dtype_is_that_of_the_file(tmp_path: Path) -> None:
    config = tiny_config()
    for kind, dtype in (("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("Q8_0", np.float32)):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, config, random_tensors(config), quantised=gguf.GGMLQuantizationType[kind])
        assert GgufSource(GgufFile(path), config).read(DOWN).dtype == dtype


@pytest.mark.parametrize("num_vshards", [1, 2, 4])
def test_packs_like_the_whole_tensors(tmp_path: Path, num_vshards: int) -> None:
    config = tiny_config()
    stored = write_gguf(tmp_path / "m.gguf", config, random_tensors(config), quantised=gguf.GGMLQuantizationType.Q4_1)
    file, cut = GgufFile(tmp_path / "m.gguf"), ModelCut.of(config, num_vshards)
    from_file = pack(config, cut, GgufSource(file, config), "bfloat16")
    from_memory = pack(config, cut, DictSource(stored), "bfloat16")
    for a, b in zip(from_file, from_memory, strict=True):
        assert a[:2] == b[:2]
        np.testing.assert_array_equal(a[2], b[2])


def test_missing_tensor(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    del tensors[DOWN]
    write_gguf(tmp_path / "m.gguf", config, tensors)
    source = GgufSource(GgufFile(tmp_path / "m.gguf"), config)
    with pytest.raises(InvalidInputError, match=f"no tensor '{DOWN}'"):
        next(pack(config, ModelCut.of(config, 2), source, "float32"))


def test_no_file_an_empty_one_and_one_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="No such file"):
        GgufFile(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(InvalidInputError, match="empty"):
        GgufFile(tmp_path / "empty.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(InvalidInputError, match="not a GGUF file"):
        GgufFile(tmp_path / "other.gguf")
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    with pytest.raises(InvalidInputError, match="version 1"):
        GgufFile(tmp_path / "old.gguf")


@hypothesis.given(share=st.floats(0.0, 0.99))  # the last bytes of a file may be padding
def test_cut_short_anywhere(small_file: Path, share: float) -> None:
    whole = small_file.read_bytes()
    short = small_file.with_name("short.gguf")
    short.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(InvalidInputError, match="cut short or damaged: download it again"):
        GgufFile(short)


@hypothesis.given(at=st.integers(4, 9000), value=st.integers(0, 255))
def test_damage_is_an_error_of_ours_or_harmless(small_file: Path, at: int, value: int) -> None:
    data = bytearray(small_file.read_bytes())
    data[at] = value
    hurt = small_file.with_name("hurt.gguf")
    hurt.write_bytes(data)
    try:
        config_from_gguf(GgufFile(hurt))
    except InvalidInputError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_arrays_in_arrays_without_end(tmp_path: Path) -> None:
    nested = b"\x09\x00\x00\x00" + b"\x01\x00\x00\x00\x00\x00\x00\x00"  # an array of one array of one ...
    header = b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x01" + bytes(7) + b"\x01" + bytes(7) + b"k"
    (tmp_path / "deep.gguf").write_bytes(header + b"\x09\x00\x00\x00" + nested * 100_000)
    with pytest.raises(InvalidInputError, match="damaged"):
        GgufFile(tmp_path / "deep.gguf")
