"""The accelerator check, with a tiny model on the CPU: everything runs, and what must be true is."""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import pytest

from nitsum_jax.bench.gpu_check import checks, shapes
from nitsum_jax.bench.gpu_check import main as gpu_check
from nitsum_jax.bench.gpu_check.ceilings import Ceilings, roofline_ms
from nitsum_jax.bench.gpu_check.findings import SCHEMA, CheckFindings, CheckRow, CheckVerdict, Surroundings, load
from nitsum_jax.bench.gpu_check.plan import FULL
from nitsum_jax.bench.gpu_check.report import decide, report
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.pack import cut_bytes
from tests.engine.quick import compiling_quickly

HERE = Surroundings("a device", 1, "0.0", "0.0", quick=False)


def run(folder: pathlib.Path, *more: str) -> dict[str, Any]:
    path, table = folder / "check.json", folder / "check.md"
    gpu_check.run(
        ["gpu-check", "--platform=cpu", "--devices=1", "--quick", f"--json={path}", f"--markdown={table}", *more]
    )
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_it_checks_and_measures_and_goes_on_where_it_was_stopped(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with compiling_quickly(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check.ceilings, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    passed = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert {name: check["passed"] for name, check in passed.items()} == {
        "zero-copy wrapping": True,
        "numerics in float32": True,
        "numerics in bfloat16": True,
        "bits of a row in float32": True,
        "bits of a row in bfloat16": True,
        "attention kernel": True,
    }
    capsys.readouterr()
    with compiling_quickly(), pytest.MonkeyPatch.context() as patch:
        for name in ("numerics", "rows_keep_their_bits", "kernel_agrees", "pointers"):
            patch.setattr(gpu_check.checks, name, interrupted)  # they are not done again
        found = run(tmp_path)
    several = ("bits at every TP in float32", "bits at every TP in bfloat16", "switches in a stream")
    assert found["left_out"] == dict.fromkeys(several, "it takes two devices")
    assert (found["schema"], found["checks"]) == (SCHEMA, passed)
    assert found["vshard_buffers"]["vshards"] in (1, 2)
    kinds = {(row["what"], row["tp"], row["vshards"], row["batch"]) for row in found["steps"].values()}
    assert kinds == {("decode", 1, 1, 4), ("prefill", 1, 1, 1), ("decode", 1, 2, 4), ("decode", 2, 1, 4)}
    table, said = (tmp_path / "check.md").read_text(), capsys.readouterr()
    assert table == said.out
    assert "| zero-copy wrapping | yes |" in table
    assert "check.json has 6 parts already" in said.err
    assert "part 14 of 14, decode of tiny" in said.err


def test_bits_are_the_same_at_every_tp_of_two_devices() -> None:
    assert checks.every_tp_gives_the_same_bits(jax.devices()[:2], "float32") == (True, "TP 1 to 2: the same bits")


def test_a_stream_goes_through_layouts_of_two_devices() -> None:
    with compiling_quickly():
        found = checks.switches_change_nothing(jax.devices()[:2])
    assert found == (True, "tp1x2 to tp2 and back in 120 tokens: the same tokens and log probabilities")


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "holds no results of this tool"),
        ("[]", "holds no results of this tool"),
        ('{"schema": "nitsum-gpu-check/1"}', "it is of nitsum-gpu-check/1"),
        (json.dumps(CheckFindings(HERE).as_json()), "holds results of device a device, here another"),
    ],
)
def test_a_file_that_it_cannot_go_on_from_is_refused(tmp_path: pathlib.Path, content: str, why: str) -> None:
    path = tmp_path / "check.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=why):
        load(path, dataclasses.replace(HERE, device="another"))


def test_what_failed_is_done_again(tmp_path: pathlib.Path) -> None:
    found = CheckFindings(HERE, Ceilings(1.0, 2.0), {"a": CheckVerdict(True, "good"), "b": CheckVerdict(False, "bad")})
    found.steps["c"] = timing(1, 1, 10.0)
    found.left_out["d"] = "no time left"
    (tmp_path / "check.json").write_text(json.dumps(found.as_json()))
    again = load(tmp_path / "check.json", HERE)
    assert (again.ceilings, list(again.checks), again.steps, again.left_out) == (found.ceilings, ["a"], found.steps, {})


def test_a_part_that_breaks_costs_no_other(tmp_path: pathlib.Path) -> None:
    def broken(_: CheckFindings) -> None:
        raise RuntimeError("the driver is gone")

    def good(found: CheckFindings) -> None:
        found.checks["good"] = CheckVerdict(True, "well")

    parts = [
        gpu_check.CheckPart("check", broken, is_check=True),
        gpu_check.CheckPart("step", broken),
        gpu_check.CheckPart("good", good),
    ]
    options = gpu_check.read_options(["gpu-check", f"--markdown={tmp_path / 'table.md'}"])
    found = CheckFindings(HERE)
    gpu_check.run_parts(parts, found, time.monotonic() + 60, options)
    assert found.checks == {
        "check": CheckVerdict(False, "RuntimeError: the driver is gone"),
        "good": CheckVerdict(True, "well"),
    }
    assert found.left_out == {"step": "RuntimeError: the driver is gone"}
    assert "| check | NO | RuntimeError: the driver is gone |" in (tmp_path / "table.md").read_text()
    late = CheckFindings(HERE)
    gpu_check.run_parts(parts, late, time.monotonic() - 1, options)
    assert (late.checks, late.left_out) == ({}, dict.fromkeys(("check", "step", "good"), "no time left"))


def test_a_kernel_is_timed_beside_xla() -> None:
    names = [timing.name for timing in FULL.timings(kernel=True)]
    assert len(names) == len(set(names))
    assert names[2] == "decode of Llama-3.1-8B, batch 32 x 1 behind 2048, TP 1, K=1"
    by_xla = [name for name in names if "attention by XLA" in name]
    assert len(by_xla) == 3
    assert [timing.name for timing in FULL.timings(kernel=False)] == [name for name in names if name not in by_xla]


def timing(vshards: int, batch: int, step_ms: float) -> CheckRow:
    return CheckRow("m", "decode", 1, vshards, batch, 1, 64, "xla", step_ms, 1.0)


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
    decision = decide(rows)
    assert decision.vshards == vshards
    assert text in decision.text
    by_name = {str(number): row for number, row in enumerate(rows)}
    assert decision.text in report(CheckFindings(HERE, Ceilings(1e12, 1e15), steps=by_name))


def test_without_the_device_it_says_what_to_do() -> None:
    with pytest.raises(PreconditionError, match="JAX finds no gpu here"):
        gpu_check.run(["gpu-check"])


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
