import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from nitsum_jax.bench.gpu_check.shapes import LLAMA_70B, slice_of
from nitsum_jax.bench.profiling import main
from nitsum_jax.bench.profiling.options import read_options
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import Profile, read_profile
from nitsum_jax.engine.kv.memory import workspace_bytes
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.profiles import load_profile, profile_names
from nitsum_jax.profiles.derive import Assumptions, derive, small_ops_s
from nitsum_jax.profiles.kernels import Kernels
from nitsum_jax.profiles.shapes import find_device, find_model
from nitsum_jax.profiles.tables import read_tables
from tests.profiles import analytic


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return analytic.write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def kernels(folder: pathlib.Path) -> Kernels:
    return Kernels(read_tables(folder, "h100_sxm"))


@pytest.fixture(scope="module")
def profile(kernels: Kernels) -> Profile:
    return derive(find_model("llama-3.1-8b"), find_device("h100"), kernels, Assumptions())


def layer_s(tp: int, tokens: int) -> float:
    """Llama-3.1-8B, by hand: products of a layer and two all-reduces."""
    shapes = [(6144 // tp, 4096), (4096, 4096 // tp), (28672 // tp, 4096), (4096, 14336 // tp)]
    reduce = analytic.collective(tokens * 4096 * 2, tp, quick=True) if tp > 1 else 0.0
    slow = analytic.collective(tokens * 4096 * 2, tp, quick=False) if tp > 1 else 0.0
    return sum(analytic.product(tokens, n, k) for n, k in shapes) + 2 * min(reduce, slow)


def head_s(tp: int, rows: int) -> float:
    gather = analytic.collective(rows * 128256 * 2, tp, quick=False) if tp > 1 else 0.0
    small = 32 * 4096 * (1.2e-9 + 4.3e-9 / tp)  # what is neither a product nor attention
    return analytic.product(rows, 128256 // tp, 4096) + gather + small


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize(("sequences", "context"), [(1, 100), (24, 900), (200, 3000)])
def test_decode_steps_are_the_sum_of_the_kernels(profile: Profile, tp: int, sequences: int, context: int) -> None:
    attention = 32 * analytic.decode(sequences, context, 8 // tp)
    expected = 0.3e-3 + 32 * layer_s(tp, sequences) + head_s(tp, sequences) + attention
    assert CostModel(profile).step_s(tp, sequences, sequences * context) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize(("new", "before"), [(512, 0), (1000, 0), (2048, 6000), (4000, 20000)])
def test_a_chunk_costs_what_it_adds_to_the_prompt(profile: Profile, tp: int, new: int, before: int) -> None:
    # Less than the whole prompt by what its context would cost alone.
    attention = analytic.prefill(1, before + new, 32 // tp) - (analytic.prefill(1, before, 32 // tp) if before else 0)
    expected = 0.3e-3 + 32 * layer_s(tp, new) + head_s(tp, 1) + 32 * attention
    assert CostModel(profile).step_s(tp, 0, 0, [(new, before)]) == pytest.approx(expected, rel=0.05)


def test_a_small_chunk_reads_all_its_context(profile: Profile) -> None:
    chunk = CostModel(profile).step_s(1, 0, 0, [(1, 65536)])
    assert chunk == pytest.approx(CostModel(profile).step_s(1, 1, 65536), rel=0.01)


def test_memory_decides_capacity_and_tps(kernels: Kernels) -> None:
    device, big = find_device("h100"), find_model("llama-3.1-70b")
    found = derive(big, device, kernels, Assumptions())
    assert tuple(found.tps) == (4, 8)  # 141 GB do not fit two of 72 GB with room for a cache
    assert big.weights == pytest.approx(70.55e9, rel=1e-3)
    # What the engine's memory plan calls workspace, for the part of the model that a device has.
    part = slice_of(LLAMA_70B, 8)
    whole = ModelCut.of(dataclasses.replace(part, vocab_size=LLAMA_70B.vocab_size), 1)
    room = 8 * (80e9 * 0.9 - workspace_bytes(part, whole, 256, 2048, "gpu", fused=True)) - big.weight_bytes
    assert found.tps[8].kv_capacity_tokens == pytest.approx(room / found.kv_bytes_per_token, abs=16)
    assert found.tps[8].kv_capacity_tokens % found.page_size == 0
    with pytest.raises(InvalidInputError, match=r"Llama-3\.1-70B does not fit 2 x NVIDIA H100 SXM, 80 GB"):
        derive(big, device, kernels, Assumptions(devices=2))


@pytest.mark.parametrize(
    ("model", "tp", "estimate_ms", "roofline_ms"),
    [
        *(("llama-3.1-8b", 1, 6.49, 5.76), ("llama-3.1-8b", 2, 3.41, 2.88)),
        *(("llama-3.1-8b", 4, 1.76, 1.44), ("llama-3.1-8b", 8, 0.95, 0.72)),
        *(("qwen2.5-32b", 8, 3.27, 2.71), ("llama-3.1-70b", 8, 6.59, 5.59)),
    ],
)
def test_small_operations_are_the_compilers_figures(
    model: str, tp: int, estimate_ms: float, roofline_ms: float
) -> None:
    """Against docs/accelerators.md: decode steps of 32 sequences on H100, context 1024."""
    assert 1000 * small_ops_s(find_model(model), tp) == pytest.approx(estimate_ms - roofline_ms, rel=0.2)


def test_links_come_from_the_exchange_of_two(profile: Profile) -> None:
    largest = analytic.BYTES[-1]
    rate = largest / 2 / analytic.collective(largest, 2, quick=False)
    assert profile.link_bytes_per_s == pytest.approx(rate, rel=1e-3)
    assert profile.transfer_latency_s == pytest.approx(analytic.collective(256, 2, quick=False), rel=1e-3)


def test_heads_that_were_not_measured_are_named(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    for path in folder.iterdir():
        keep = [row for row in path.read_text().splitlines() if ",32,8,128," not in row]
        (tmp_path / path.name).write_text("\n".join(keep))
    bare = Kernels(read_tables(tmp_path, "h100_sxm"))
    with pytest.raises(InvalidInputError, match="decode attention table has no rows of 32 query heads, 8 KV heads"):
        derive(find_model("llama-3.1-8b"), find_device("h100"), bare, Assumptions())


# ---- the profiles that come with the package


PACKAGED = {
    "llama-3.1-70b-h100": (4, 8),
    "llama-3.1-70b-h200": (2, 4, 8),
    "llama-3.1-8b-h100": (1, 2, 4, 8),
    "llama-3.1-8b-h200": (1, 2, 4, 8),
    "qwen2.5-14b-h100": (1, 2, 4, 8),
    "qwen2.5-14b-h200": (1, 2, 4, 8),
    "qwen2.5-32b-h100": (2, 4, 8),
    "qwen2.5-32b-h200": (1, 2, 4, 8),
}


def test_packaged_profiles_load_and_are_small() -> None:
    assert profile_names() == tuple(PACKAGED)
    folder = pathlib.Path(sys.modules["nitsum_jax.profiles.packaged"].__path__[0])
    for name, tps in PACKAGED.items():
        profile = load_profile(name)
        assert (profile.name, tuple(profile.tps), profile.devices, profile.mixed_steps) == (name, tps, 8, True)
        assert "AIConfigurator (Apache-2.0; vLLM 0.24 kernels, NCCL 2.29)" in profile.source
        assert (folder / f"{name}.json").stat().st_size < 100_000


def test_figures_published_with_the_tables() -> None:
    # The tables' README: Llama-3.1-8B on H200, 32 decode tokens, matmuls and all-reduces of the layers.
    tps = load_profile("llama-3.1-8b-h200").tps
    assert [1000 * tps[tp].dense.at(32) for tp in (1, 2, 4, 8)] == pytest.approx([4.3, 2.7, 1.9, 1.6], rel=0.04)


@pytest.mark.parametrize("name", PACKAGED)
def test_more_devices_are_faster_and_never_more_than_in_proportion(name: str) -> None:
    cost = CostModel(load_profile(name))
    for small, large in zip(cost.tps, cost.tps[1:], strict=False):
        for step in ((1, 1000, ()), (64, 64_000, ()), (0, 0, ((2048, 0),)), (16, 16_000, ((512, 4096),))):
            ratio = cost.step_s(small, *step) / cost.step_s(large, *step)
            assert 1.0 < ratio < 2.1, (small, large, step)


def test_an_unknown_profile_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no profile is called 'gpt': use llama-3\.1-70b-h100, "):
        load_profile("gpt")
    with pytest.raises(InvalidInputError, match=r"x\.json: cannot read the profile"):
        load_profile(str(tmp_path / "x.json"))


# ---- the command


def test_the_command_writes_profiles(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-m", "nitsum_jax.bench.profiling.main", f"--derive={folder}", f"--out={tmp_path}/new"]
    command += ["--kinds=h100", "--model=qwen2.5-32b", "--host_overhead_ms=1", "--page_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/new/qwen2.5-32b-h100.json: TP 2, 4, 8\n"
    profile = read_profile(tmp_path / "new" / "qwen2.5-32b-h100.json")
    assert (profile.host_overhead_s, profile.page_size) == (0.001, 32)
    assert json.loads((tmp_path / "new" / "qwen2.5-32b-h100.json").read_text())["schema"] == "nitsum-profile/1"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to do: give --model to measure one, or --derive=DIR"),
        (["--heldout", "--model=x"], "--heldout checks kernel tables: give their folder"),
        (["--derive=x"], "--out is missing"),
        (["--derive=x", "--out=y", "--quick"], "--quick means nothing with --derive"),
        (["--model=x", "--out=y", "--kinds=h100"], "--kinds means nothing with --model alone"),
        (["--derive=x", "--out=y", "--memory_fraction=2"], "memory_fraction"),
        (["--derive=x", "--out=y", "--devices=0"], "devices"),
    ],
)
def test_wrong_flags_are_told(arguments: list[str], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        read_options(["nitsum-profile", *arguments])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model=gpt"], "no shape is known for 'gpt': use llama-3.1-8b"),
        (["--kinds=tpu"], "no tables are known for 'tpu': use h100, h200"),
        (["--kinds=h200"], "h200_sxm_gemm_bf16.csv: cannot read the table: No such file"),
    ],
)
def test_wrong_names_are_one_line(
    arguments: list[str], says: str, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["nitsum-profile", f"--derive={folder}", f"--out={tmp_path}", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_quick_takes_smaller_batches_unless_told() -> None:
    sizes = [
        read_options(["nitsum-profile", "--model=x", "--out=y", *more]).max_batch
        for more in ([], ["--quick"], ["--quick", "--max_batch=64"])
    ]
    assert sizes == [32, 8, 64]
