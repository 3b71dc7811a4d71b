import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint.safetensors_source import SafetensorsSource, SafetensorsWriter
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import pack
from tests.models.checkpoint.helpers import DictSource, random_tensors, tiny_config, write_hf

EMBED = "model.embed_tokens.weight"


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_packs_like_the_tensors_in_memory(tmp_path: Path, files: int, dtype: type) -> None:
    config = tiny_config(architecture="qwen2")
    tensors, cut = random_tensors(config), ModelCut.of(config, 4)
    source = SafetensorsSource(write_hf(tmp_path, config, tensors, files=files, dtype=dtype))
    assert set(source.names()) == set(tensors)
    assert source.read(EMBED).dtype == dtype
    for target in ("float32", "bfloat16"):
        from_files = pack(config, cut, source, target)
        for a, b in zip(from_files, pack(config, cut, DictSource(tensors), target), strict=True):
            assert a[:2] == b[:2]
            assert a[2].dtype == b[2].dtype
            np.testing.assert_array_equal(a[2], b[2])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_memory_stays_under_one_tensor(tmp_path: Path, dtype: type) -> None:
    """Packing holds pieces only: far less than the largest tensor, and nothing of earlier parameters."""
    config = tiny_config(d_model=256, d_mlp=1024, vocab_size=4096, num_layers=4)
    folder = write_hf(tmp_path, config, random_tensors(config), files=2, dtype=dtype)
    source, cut = SafetensorsSource(folder), ModelCut.of(config, 4)
    largest_tensor = 4096 * 256 * np.dtype(dtype).itemsize
    tracemalloc.start()
    try:
        for _ in pack(config, cut, source, "float32" if dtype is np.float32 else "bfloat16"):
            pass
        alone = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        kept = list(pack(config, cut, source, "float32" if dtype is np.float32 else "bfloat16"))
        with_model = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    model = sum(value.nbytes for _, _, value in kept)
    assert largest_tensor / 4 < alone < largest_tensor
    assert model < with_model < model + largest_tensor


def test_missing_tensor_and_missing_file(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    write_hf(tmp_path / "a", config, {name: value for name, value in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(InvalidInputError, match=r"no tensor 'model\.norm\.weight'"):
        next(pack(config, ModelCut.of(config, 2), SafetensorsSource(tmp_path / "a"), "float32"))
    write_hf(tmp_path / "b", config, tensors, files=2)
    (tmp_path / "b" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"model-00002-of-00002\.safetensors: it is missing"):
        SafetensorsSource(tmp_path / "b")
    with pytest.raises(InvalidInputError, match="no safetensors files"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    config = tiny_config()
    write_hf(tmp_path, config, random_tensors(config))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InvalidInputError, match=r"model\.safetensors: it is cut short or damaged") as error:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InvalidInputError, match="not a safetensors index"):
        SafetensorsSource(tmp_path)


def test_quantised_tensors_are_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({EMBED: np.zeros((4, 4), np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidInputError, match="is of type I8"):
        SafetensorsSource(tmp_path).shape(EMBED)


@pytest.mark.parametrize(("max_bytes", "files"), [(2**30, 1), (100_000, 2), (1, 22)])
def test_writer_starts_a_new_file_when_one_is_full(tmp_path: Path, max_bytes: int, files: int) -> None:
    tensors = random_tensors(tiny_config())
    writer = SafetensorsWriter(tmp_path, max_bytes)
    for name, value in tensors.items():
        writer.add(name, value)
    writer.close()
    written = sorted(path.name for path in tmp_path.iterdir())
    names = [name for name in written if name.endswith(".safetensors")]
    expected = len(tensors) if max_bytes == 1 else files
    assert len(names) == expected
    if expected > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
        assert set(index["weight_map"].values()) == set(names)
    else:
        assert written == ["model.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / names[0]).stat().st_mode == (tmp_path / "other").stat().st_mode
    source = SafetensorsSource(tmp_path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(source.read(name), value)
