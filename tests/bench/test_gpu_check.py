"""The accelerator check, with a tiny model on the CPU: everything runs, and what must be true is."""

import json
import pathlib

import pytest

from nitsum_jax.bench.gpu_check import main as gpu_check
from nitsum_jax.bench.gpu_check import shapes
from nitsum_jax.bench.gpu_check.ceilings import Ceilings, roofline_ms
from nitsum_jax.errors import PreconditionError
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import cut_bytes
from tests.engine.quick import quick_compiles  # noqa: F401


@pytest.mark.usefixtures("quick_compiles")
def test_it_checks_and_measures(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, table = tmp_path / "check.json", tmp_path / "check.md"
    gpu_check.run(["gpu-check", "--platform=cpu", "--quick", f"--json={path}", f"--markdown={table}"])
    found = json.loads(path.read_text())
    assert found["schema"] == gpu_check.SCHEMA
    assert {name: check["passed"] for name, check in found["checks"].items()} == {
        "zero-copy wrapping": True,
        "numerics in float32": True,
        "numerics in bfloat16": True,
    }
    assert found["left_out"] == []
    assert found["vshard_buffers"]["vshards"] in (1, 2)
    kinds = {(row["what"], row["tp"], row["vshards"], row["batch"]) for row in found["steps"]}
    assert kinds == {
        *[("decode", 1, 1, 4), ("prefill", 1, 1, 1), ("decode", 1, 2, 4), ("decode", 2, 1, 4)],
    }
    assert table.read_text() == capsys.readouterr().out
    assert "| zero-copy wrapping | yes |" in table.read_text()


def timing(vshards: int, batch: int, step_ms: float) -> gpu_check.CheckRow:
    return gpu_check.CheckRow("m", "decode", 1, vshards, batch, 1, 64, step_ms, 1.0)


@pytest.mark.parametrize(
    ("steps", "vshards", "text"),
    [
        ({(2, 1): 10.1, (8, 1): 10.4, (8, 4): 19.0}, 8, "cost little here (K=2 +1.0%, K=8 +4.0%): keep them"),
        (
            {(2, 1): 10.1, (8, 1): 10.4, (8, 4): 25.0},
            2,
            "start servers with --vshards=2; that fuses the weights to 2 b",
        ),
        ({(2, 1): 12.0}, 1, "start servers with --vshards=1; that fuses the weights to 1 buffer per"),
        ({}, None, "no decision"),
    ],
)
def test_measurement_decides_how_many_buffers(
    steps: dict[tuple[int, int], float], vshards: int | None, text: str
) -> None:
    rows = [timing(1, 1, 10.0), timing(1, 4, 20.0), *(timing(*key, step_ms) for key, step_ms in steps.items())]
    decision = gpu_check.decide(rows)
    assert decision.vshards == vshards
    assert text in decision.text
    assert decision.text in gpu_check.report([_FakeDevice()], {}, Ceilings(1e12, 1e15), rows, [])


class _FakeDevice:
    device_kind = "a device"


def test_without_the_device_it_says_what_to_do() -> None:
    with pytest.raises(PreconditionError, match="JAX finds no gpu here"):
        gpu_check.run(["gpu-check"])


def test_without_time_it_says_what_was_left_out(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "check.json"
    rows: list[gpu_check.CheckRow] = []
    left_out = gpu_check._time_all(gpu_check.QUICK, None, Ceilings(1.0, 1.0), 0.0, rows)
    assert (rows, len(left_out)) == ([], 4)
    assert left_out[0] == "decode of tiny, batch 4, TP 1, K=1: no time left"
    assert not path.exists()


@pytest.mark.parametrize("config", [shapes.LLAMA_8B, shapes.QWEN_32B], ids=lambda config: config.name)
def test_parameters_are_counted_as_the_checkpoint_has_them(config: shapes.ModelConfig) -> None:
    cut, replicated = cut_bytes(config, ModelCut.of(config, 1), "bfloat16")
    counted = config.num_layers * shapes.layer_parameters(config) + 2 * shapes.head_parameters(config)
    assert cut + replicated == pytest.approx(2 * counted, rel=1e-3)  # norms and biases are left out


def test_one_sequence_is_bound_by_bytes_and_a_prompt_by_operations() -> None:
    limits = Ceilings(4.8e12, 9.9e14)
    decode = roofline_ms(shapes.LLAMA_8B, limits, batch=1, tokens=1, context=0)
    assert decode == pytest.approx(1000 * 2 * 7.5e9 / 4.8e12, rel=0.02)  # all but the embedding is read
    prefill = roofline_ms(shapes.LLAMA_8B, limits, batch=1, tokens=4096, context=0)
    assert prefill == pytest.approx(1000 * (2 * 4096 * 6.98e9 + 2 * 32 * 4096 * 4096**2) / 9.9e14, rel=0.02)
