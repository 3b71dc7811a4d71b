"""nitsum-bench switch on a tiny model: bytes are exact, times at least consistent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nitsum_jax.bench import main, switch_report
from nitsum_jax.bench.switch import read_options
from nitsum_jax.bench.switch_rows import Measured, SwitchRow
from nitsum_jax.errors import InvalidInputError
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")

FIELDS = (
    *("from_layout", "to_layout", "live_sequences", "context_tokens", "weight_bytes_moved", "kv_bytes_moved"),
    *("kv_bytes_minimum", "stall_ms_p50", "stall_ms_p99", "decode_step_ms", "transfer_gbps", "memcpy_gbps"),
    "alternatives",
)


def test_a_walk_of_a_tiny_model(tmp_path: Path) -> None:
    folder = tiny_models.write_hf_folder("llama_gqa_tied", tmp_path / "model")
    rows_file, picture = tmp_path / "rows.json", tmp_path / "picture.png"
    # A process of its own: it chooses its number of devices before JAX starts.
    command = [
        sys.executable,
        "-m",
        "nitsum_jax.bench.main",
        "switch",
        f"--model={folder}",
        "--dtype=float32",
        "--layouts=tp1x2;tp2",
        "--devices=2",
    ]
    command += ["--quick", "--layers=2", f"--json={rows_file}", f"--plot={picture}", f"--cache_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (row,) = (json.loads(line) for line in rows_file.read_text().splitlines())
    assert tuple(row) == FIELDS
    assert (row["from_layout"], row["to_layout"], row["live_sequences"]) == ("tp1x2", "tp2", 8)
    assert row["weight_bytes_moved"] == 0
    assert row["kv_bytes_moved"] == row["kv_bytes_minimum"] > 0
    assert 0 <= row["stall_ms_p50"] <= row["stall_ms_p99"]
    assert set(row["alternatives"]) == {"device_put", "rebuild", "recompute"}
    assert all(milliseconds > 0 for milliseconds in row["alternatives"].values())
    assert "| tp1x2 -> tp2 | 8 | 128 | 0 |" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_sequences_and_contexts_are_lists() -> None:
    options = read_options(["nitsum-bench switch", "--live=4,8", "--context=20"])
    assert (options.live, options.context, options.layers) == ((4, 8), (20,), None)


def test_quick_is_small() -> None:
    options = read_options(["nitsum-bench switch", "--quick", "--devices=4"])
    assert (options.live, options.context) == ((8,), (128,))
    assert options.layouts == ("tp1x4", "tp2x2", "tp4", "tp1x4")


@pytest.mark.parametrize("flag", ["--live=a", "--context=0", "--plot=x.pdf", "--devices=1"])
def test_wrong_flags_are_told(flag: str) -> None:
    with pytest.raises(InvalidInputError, match=flag.split("=")[0].removeprefix("--")):
        read_options(["nitsum-bench switch", flag])


def test_unknown_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["nitsum-bench", "fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err
    assert main.main(["nitsum-bench"]) == 0
    assert "switch" in capsys.readouterr().out


def test_a_table_has_a_line_per_row() -> None:
    row = SwitchRow("tp1", "tp2", 1, 2, 0, 3_000_000, 2_000_000, 5.0, 6.0, 3.0, 1.5, 9.0, {"recompute": 70.0})
    item = Measured(
        row, decode_step_before_ms=4.0, gap_ms_p99=9.5, kv_bytes_ahead=1_000_000, host_ms=1.0, transfer_ms=2.0
    )
    line = switch_report.table([item]).splitlines()[-1]
    moved, stall = "3.0 | 1.0 | 1.500", "5.0 | 6.0 | 1.50 | 9.5 | 4.0 | 3.0"
    assert line == f"| tp1 -> tp2 | 1 | 2 | 0 | {moved} | {stall} | 1.0 | 2.0 | 1.5 | 9.0 | - | 70 | - |"
