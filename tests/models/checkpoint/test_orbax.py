import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.checkpoint import orbax_io
from nitsum_jax.models.checkpoint.orbax_io import OrbaxCheckpoint, save_orbax
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import cut_bytes, pack
from tests.models.checkpoint.helpers import DictSource, random_tensors, tiny_config

CONFIG = tiny_config(architecture="qwen2", num_heads=14, num_kv_heads=2, d_mlp=37)
TENSORS = random_tensors(CONFIG)
CUT = ModelCut.of(CONFIG, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orbax") / "model"
    save_orbax(path, CONFIG, CUT, pack(CONFIG, CUT, DictSource(TENSORS), "bfloat16"), "bfloat16")
    return path


def packed(config: ModelConfig, cut: ModelCut, dtype: str) -> dict[tuple[str, int | None], np.ndarray]:
    return {(name, k): value for name, k, value in pack(config, cut, DictSource(TENSORS), dtype)}


def test_says_what_it_is(folder: Path) -> None:
    checkpoint = OrbaxCheckpoint(folder)
    assert checkpoint.config == ModelConfig(**{f: getattr(CONFIG, f) for f in CONFIG.__slots__} | {"dtype": "bfloat16"})
    assert checkpoint.cut.num_vshards == 4
    assert checkpoint.dtype == np.dtype("bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("group_bytes", [1, 30_000, 2**30])
def test_streams_what_was_saved(folder: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, group_bytes: int) -> None:
    monkeypatch.setattr(orbax_io, "GROUP_BYTES", group_bytes)
    expected = packed(CONFIG, CUT, dtype)
    seen = []
    for name, vshard, value in OrbaxCheckpoint(folder).stream(dtype):
        seen.append((name, vshard))
        assert value.dtype == expected[name, vshard].dtype
        np.testing.assert_array_equal(value, expected[name, vshard])
    assert seen == list(expected)


@pytest.mark.parametrize("group_bytes", [1, 2**30])
def test_places_vshards_on_their_devices(folder: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int) -> None:
    monkeypatch.setattr(orbax_io, "GROUP_BYTES", group_bytes)
    devices = jax.devices()[:4]
    residency = {0: {0, 1, 2, 3}, 1: {2, 3}, 3: {1}}
    expected = packed(CONFIG, CUT, "bfloat16")
    seen = set()
    for name, vshard, device, value in OrbaxCheckpoint(folder).place(devices, residency, "bfloat16"):
        assert value.sharding == jax.sharding.SingleDeviceSharding(devices[device])
        np.testing.assert_array_equal(np.asarray(value), expected[name, vshard])
        seen.add((name, vshard, device))
    assert seen == {
        (name, vshard, device)
        for name, vshard in expected
        for device, held in residency.items()
        if vshard is None or vshard in held
    }


def test_restores_into_shardings_and_nothing_else(folder: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    single = jax.sharding.SingleDeviceSharding(jax.devices()[5])
    keys: dict[tuple[str, int | None], jax.sharding.Sharding] = {
        ("layers.0.attn.qkv", 1): rows,
        ("final_norm", None): single,
    }
    restored = OrbaxCheckpoint(folder).restore(keys, "float32")
    expected = packed(CONFIG, CUT, "float32")
    assert set(restored) == set(keys)
    for key, sharding in keys.items():
        assert restored[key].sharding == sharding
        np.testing.assert_array_equal(np.asarray(restored[key]), expected[key])


def test_saves_arrays_that_lie_on_devices(tmp_path: Path) -> None:
    devices = jax.devices()
    values = [
        (name, k, jax.device_put(value, devices[k or 0])) for (name, k), value in packed(CONFIG, CUT, "float32").items()
    ]
    save_orbax(tmp_path / "model", CONFIG, CUT, values, "float32")
    for name, k, value in OrbaxCheckpoint(tmp_path / "model").stream("float32"):
        np.testing.assert_array_equal(value, packed(CONFIG, CUT, "float32")[name, k])


@pytest.mark.parametrize("num_vshards", [1, 2, 8])
def test_another_cut_reads_it_as_tensors(folder: Path, num_vshards: int) -> None:
    other = ModelCut.of(CONFIG, num_vshards)
    expected = packed(CONFIG, other, "bfloat16")
    for name, k, value in pack(CONFIG, other, OrbaxCheckpoint(folder), "bfloat16"):
        np.testing.assert_array_equal(value, expected[name, k])


def test_host_never_holds_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the devices' buffers (on a CPU these are host memory too), less than two layers are there at any time."""
    monkeypatch.setattr(orbax_io, "GROUP_BYTES", 1)
    config = tiny_config(d_model=256, d_mlp=1024, num_layers=6)
    cut = ModelCut.of(config, 4)
    source = DictSource(random_tensors(config))
    save_orbax(tmp_path / "m", config, cut, pack(config, cut, source, "float32"), "float32")
    model = sum(value.nbytes for value in source.tensors.values())
    residency = {k: {k} for k in range(4)}
    checkpoint = OrbaxCheckpoint(tmp_path / "m")
    tracemalloc.start()
    try:
        kept = list(checkpoint.place(jax.devices()[:4], residency, "float32"))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    per_device = sum(cut_bytes(config, cut, "float32"))
    assert sum(value.nbytes for _, _, _, value in kept) == 4 * per_device
    assert peak - held < 2 * model / 6


def test_an_existing_checkpoint_is_not_written_over(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="already holds a checkpoint"):
        save_orbax(folder, CONFIG, CUT, [], "float32")


@pytest.mark.parametrize("damage", ["no weights", "a file is missing", "a file is cut short"])
def test_damaged_weights_are_found_when_opening(folder: Path, tmp_path: Path, damage: str) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(folder, hurt)
    largest = max((hurt / "weights").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    match damage:
        case "no weights":
            shutil.rmtree(hurt / "weights")
        case "a file is missing":
            largest.unlink()
        case _:
            largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match="incomplete or damaged; convert the model again") as error:
        OrbaxCheckpoint(hurt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"format_version": 3}, "format 3, this program reads 1 and 2"),
        ({"format_version": 1}, "incomplete or damaged"),
        ({"format_version": 1, "num_vshards": 3, "dtype": "float32"}, "power of two"),
        ({"format_version": 1, "num_vshards": 4, "dtype": "int4"}, "int4"),
        ([], "incomplete or damaged"),
    ],
)
def test_other_formats_are_refused(folder: Path, tmp_path: Path, meta: object, message: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    if isinstance(meta, dict):
        meta = {"files": json.loads((folder / "nitsum.json").read_text())["files"]} | meta
    (other / "nitsum.json").write_text(json.dumps(meta))
    with pytest.raises(InvalidInputError, match=message):
        OrbaxCheckpoint(other)


def test_weights_of_another_model(folder: Path, tmp_path: Path) -> None:
    hurt = tmp_path / "hurt"
    shutil.copytree(folder, hurt)
    config = json.loads((hurt / "config.json").read_text())
    (hurt / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(InvalidInputError, match="incomplete or damaged"):
        OrbaxCheckpoint(hurt)


def test_a_vshard_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no tensor 'head\.table of vshard 9'"):
        OrbaxCheckpoint(folder).restore(
            {("head.table", 9): jax.sharding.SingleDeviceSharding(jax.devices()[0])}, "float32"
        )
