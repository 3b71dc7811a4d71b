"""nitsum-simulate from its flags to its files, and its errors."""

import json
import pathlib

import pytest

from nitsum_jax.sim.main import main
from nitsum_jax.sim.runs.metrics import measure, tiers_of
from nitsum_jax.sim.runs.records import read_requests
from nitsum_jax.sim.runs.tables import RequestTable

PROFILE = "--profile=llama-3.1-8b-h100"
SMALL = (PROFILE, "--devices=2", "--seconds=4", "--noprogress", "--rate_scale=1.5")


def _tool(*flags: str) -> int:
    return main(["nitsum-simulate", *flags])


def test_a_run_writes_its_logs_and_a_report(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert _tool(*SMALL, f"--out={out}", "--compile_s=0") == 0
    printed = capsys.readouterr().out
    assert "| adaptive |" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["policy"] == "adaptive"
    requests = RequestTable.of(read_requests(out / "requests.jsonl"))
    again = measure(requests, tiers_of(summary), summary["seconds"])
    assert again.total.goodput == summary["total"]["goodput"]
    assert (out / "steps.jsonl").stat().st_size > 1000
    assert "<svg" in (out / "report.html").read_text() or "data:image" in (out / "report.html").read_text()


def test_policies_are_compared_and_capacities_found(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (*SMALL[:3], "--noprogress", "--policies=tp2,tp1/chat+tp1/code,+bound", "--capacity", "--nosteps")
    assert _tool(*flags, f"--out={tmp_path}") == 0
    printed = capsys.readouterr().out
    assert "| tp2 |" in printed
    assert "upper bound: goodput" in printed
    assert "capacity of tp2 at 90 % attainment: " in printed
    assert (tmp_path / "tp2" / "summary.json").exists()
    assert (tmp_path / "tp2" / "steps.jsonl").read_text() == ""
    assert (tmp_path / "report.html").exists()


def test_decisions_are_made_again(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tool(PROFILE, "--devices=2", "--seconds=12", "--noprogress", f"--out={tmp_path}") == 0
    log = tmp_path / "decisions.jsonl"
    lines = log.read_text().splitlines()
    assert lines
    capsys.readouterr()
    assert _tool(PROFILE, "--devices=2", f"--replay={log}") == 0
    assert f"{len(lines)} decisions made again: {len(lines)} the same, 0 different" in capsys.readouterr().out
    record = json.loads(lines[0])
    log.write_text(json.dumps(record | {"choice": "tp8"}) + "\n")
    assert _tool(PROFILE, "--devices=2", f"--replay={log}") == 1
    assert "instead of tp8" in capsys.readouterr().out
    log.write_text(json.dumps(record | {"inputs": {"time_s": 1}}) + "\n")
    assert _tool(PROFILE, "--devices=2", f"--replay={log}") == 2
    assert f"{log}:1: not the inputs of a decision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--profile is missing"),
        (("--profile=none",), "no profile is called 'none'"),
        ((PROFILE, "--rate_scale=0"), "--rate_scale=0: give a number above 0"),
        ((PROFILE, "--seconds=-1"), "--seconds=-1: give a number above 0"),
        ((PROFILE, "--devices=0"), "devices"),
        ((PROFILE, "--nonsense=1"), "nonsense"),
        ((PROFILE, "word"), "unexpected argument 'word'"),
        ((PROFILE, "--trace=chat"), "write TIER:FILE"),
        ((PROFILE, "--trace=chat:/no/such.csv"), "/no/such.csv: cannot read the trace"),
        ((PROFILE, "--trace=gold:azure-conv-like", "--seconds=2"), "no tier 'gold'"),
        ((PROFILE, "--tiers=/no/tiers.toml"), "/no/tiers.toml: cannot read the tiers file"),
        ((PROFILE, "--policy=magic", "--seconds=2"), "unknown policy 'magic': use adaptive, static-tp1"),
        ((PROFILE, "--policy=tp3", "--seconds=2"), "tp3 is not a power of two"),
        (("--profile=llama-3.1-70b-h100", "--policy=tp2", "--seconds=2"), "TP 2 is not in the profile"),
        ((PROFILE, "--policy=tp8+tp8", "--seconds=2"), "needs more than the 8 devices"),
        ((PROFILE, "--policy=tp4,tp4", "--seconds=2"), "'tp4,tp4' is not part of a layout: write instances as tpT"),
        ((PROFILE, "--policy=tp4/chat;code", "--seconds=2"), "is not part of a layout"),
        ((PROFILE, "--policies=tp4,tp4", "--seconds=2"), "a policy is named twice"),
        ((PROFILE, "--policies=tp4/chat,code;tp4/chat,code", "--seconds=2"), "a policy is named twice"),
        ((PROFILE, "--policy=tp4", "--policies=tp4"), "both given"),
        ((PROFILE, "--devices=12", "--policy=tp4", "--seconds=2"), "give a multiple of 8"),
        (("--profile=llama-3.1-70b-h100", "--devices=2", "--seconds=2"), "needs at least 4 devices"),
        ((PROFILE, "--replay=/no/decisions.jsonl"), "/no/decisions.jsonl: cannot read the log"),
    ],
)
def test_errors_are_one_line(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _tool(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_errors_in_files_name_their_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text("[tiers.chat]\nttft_ms = 500\ntpot_ms = 0\n")
    assert _tool(PROFILE, f"--tiers={tiers}") == 2
    assert f"{tiers}:3" in capsys.readouterr().err
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,100,10\n1.0,many,10\n")
    assert _tool(PROFILE, f"--trace=chat:{trace}") == 2
    assert f"{trace}:3" in capsys.readouterr().err


def test_help_lists_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert _tool("--help") == 0
    printed = capsys.readouterr().out
    for flag in ("--profile", "--trace", "--tiers", "--policies", "--replay", "--[no]capacity"):
        assert flag in printed
