"""nitsum-simulate --audit: logs of a real run pass; what somebody changes in the files is found, with its line."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from nitsum_jax.sim.main import main

FLAGS = ("--profile=llama-3.1-8b-h100", "--devices=4", "--seconds=8", "--noprogress", "--rate_scale=3", "--compile_s=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["nitsum-simulate", *FLAGS, f"--out={out}"]) == 0
    return out


@pytest.fixture
def run(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


def audit(*flags: str) -> int:
    return main(["nitsum-simulate", *flags])


def change(path: pathlib.Path, line: int, **values: Any) -> None:
    """Changes an entry of a log, line numbers from 1; values may be functions of the old ones."""
    lines = path.read_text().splitlines(keepends=True)
    entry = json.loads(lines[line - 1])
    for key, value in values.items():
        entry[key] = value(entry[key]) if callable(value) else value
    lines[line - 1] = json.dumps(entry) + "\n"
    path.write_text("".join(lines))


def line_of(path: pathlib.Path, wanted: Callable[[dict[str, Any]], bool], after: int = 0) -> int:
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return next(i for i, entry in enumerate(entries, 1) if i > after and wanted(entry))


def test_a_finished_run_passes(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(f"--audit={run}") == 0
    printed = capsys.readouterr().out
    assert "profile llama-3.1-8b-h100, TTFT/TPOT targets chat 500/50 ms, code 10000/200 ms" in printed
    assert printed.count("  ok    ") == 7
    assert "WRONG" not in printed
    assert printed.endswith("1 run passes the audit\n")


def test_runs_side_by_side_are_all_audited(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(*FLAGS[:1], "--devices=2", "--seconds=3", "--policies=tp1x2,tp2", f"--out={tmp_path}") == 0
    assert audit(f"--audit={tmp_path}") == 0
    assert "2 runs pass the audit" in capsys.readouterr().out
    change(tmp_path / "tp2" / "steps.jsonl", 3, end_s=lambda t: t + 1e-3)
    assert audit(f"--audit={tmp_path}") == 1
    assert f"1 of 2 runs fail the audit: {tmp_path}/tp2/steps.jsonl:" in capsys.readouterr().out


def busy(entry: dict[str, Any]) -> bool:
    return bool(entry["decode_sequences"] and not entry["prefill_tokens"])


@pytest.mark.parametrize("kind", ["faster step", "met", "finish", "idle tokens", "double", "dropped"])
def test_what_was_changed_is_found_with_its_line(
    kind: str, run: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps, requests = run / "steps.jsonl", run / "requests.jsonl"
    place = ""
    if kind == "faster step":
        line = line_of(steps, busy, after=40)
        change(steps, line, end_s=lambda t: t - 1e-3)
        place, check = f"{steps}:{line}: ", "every step takes the profile's time"
    elif kind == "met":
        change(requests, 7, met=lambda met: not met)
        place, check = f"{requests}:7: ", "every request is there once"
    elif kind == "finish":
        change(requests, 5, finish_s=lambda t: t - 1e-3)
        place, check = f"{requests}:5: ", "tokens come out where and when"
    elif kind == "idle tokens":
        line = line_of(steps, busy, after=40)
        change(steps, line, decode_sequences=200)
        place, check = f"{steps}:{line}: ", "tokens come out where and when"
    elif kind == "double":
        lines = steps.read_text().splitlines(keepends=True)
        steps.write_text("".join([*lines, lines[60]]))
        check = "no device does two things at once"
    else:
        line = line_of(steps, lambda entry: sum(entry["prefill_tokens"]) > 200)
        lines = steps.read_text().splitlines(keepends=True)
        steps.write_text("".join(lines[: line - 1] + lines[line:]))
        check = "every token was paid for"
    assert audit(f"--audit={run}") == 1
    printed = capsys.readouterr().out
    assert f"  WRONG {check}" in printed
    assert place in printed
    last = printed.splitlines()[-1]
    assert last.startswith("1 of 1 runs fail the audit: ")
    assert last.split(": ")[1].rpartition(":")[2].isdigit()  # file:line of the first


def test_a_better_summary_is_found(run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "summary.json"
    summary = json.loads(path.read_text())
    summary["total"]["goodput"] += 0.01
    path.write_text(json.dumps(summary))
    assert audit(f"--audit={run}") == 1
    printed = capsys.readouterr().out
    assert "  WRONG goodput and every figure of the summary follow from the logs" in printed
    assert f"{path}: summary: total: goodput is" in printed


def test_other_targets_and_profiles_can_be_given(
    run: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit(f"--audit={run}", "--profile=llama-3.1-8b-h200") == 1
    assert "but the profile says" in capsys.readouterr().out
    tiers = tmp_path / "tiers.toml"
    tiers.write_text("[tiers.chat]\nttft_ms = 1\ntpot_ms = 1\n[tiers.code]\nttft_ms = 1\ntpot_ms = 1\n")
    assert audit(f"--audit={run}", f"--tiers={tiers}") == 1
    assert "met is True, but its times say False" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("line", "steps.jsonl:4: not a StepRecord"),
        ("empty", "steps.jsonl: the run was made with --nosteps"),
        ("nothing", "no summary.json in it"),
        ("profile", "--profile overrides it"),
        ("targets", "it names no targets: give --tiers"),
        ("policy", "--audit runs nothing"),
    ],
)
def test_errors_are_one_line(damage: str, message: str, run: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    flags = [f"--audit={run}"]
    if damage == "line":
        lines = (run / "steps.jsonl").read_text().splitlines(keepends=True)
        (run / "steps.jsonl").write_text("".join([*lines[:3], "{broken\n", *lines[3:]]))
    elif damage == "empty":
        (run / "steps.jsonl").write_text("")
        (run / "summary.json").write_text(json.dumps(summary | {"steps": None}))
    elif damage == "nothing":
        flags = [f"--audit={run}/none"]
    elif damage == "profile":
        (run / "summary.json").write_text(json.dumps(summary | {"profile": "nobody's"}))
    elif damage == "targets":
        del summary["targets"]
        (run / "summary.json").write_text(json.dumps(summary))
    else:
        flags.append("--policy=adaptive")
    assert audit(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
