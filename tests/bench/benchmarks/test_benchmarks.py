import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from benchmarks.engine import (
    activation_types,
    compiling,
    decode,
    decode_table,
    matmul_forms,
    reference_worker,
    startup,
)
from benchmarks.engine.decode_table import BARE, ENGINE, TRANSFORMERS, Sample
from nitsum_jax.bench.compile.operations import OperationCounts
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.runtime.startup import compile_cache
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden.tiny_models import write_hf_folder

pytestmark = pytest.mark.usefixtures("quick_compiles")

_SAMPLES = [
    Sample(0, 8, ENGINE, 100.0, 80.0),
    Sample(0, 8, BARE, 110.0),
    Sample(0, 8, TRANSFORMERS, 50.0, 40.0),
    Sample(1, 8, ENGINE, 50.0, 40.0),  # the machine was slow, for both
    Sample(1, 8, BARE, 55.0),
    Sample(2, 8, ENGINE, 120.0, 90.0),
    Sample(2, 8, BARE, 120.0),
]


def test_ratios_are_medians_within_rounds() -> None:
    assert decode_table.ratio(_SAMPLES, 8, ENGINE, BARE) == pytest.approx(100 / 110)
    # Only one round has both.
    assert decode_table.ratio(_SAMPLES, 8, ENGINE, TRANSFORMERS) == 2.0
    assert decode_table.ratio(_SAMPLES, 1, ENGINE, BARE) is None


def test_rows_and_table() -> None:
    engine, bare, transformers = decode_table.rows(_SAMPLES, {ENGINE: 40.0, BARE: 40.0})
    assert (engine.decode, engine.slowest, engine.fastest, engine.total) == (100.0, 50.0, 120.0, 80.0)
    assert (engine.step_ms, engine.limit_share, engine.engine_ratio) == (80.0, 0.5, None)
    assert bare.total is None
    assert transformers.limit_share is None
    lines = decode_table.table([engine, bare, transformers]).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["8", "engine", "100.0", "50.0..120.0", "80.0", "80.00", "50%", "-"]
    assert lines[3].split()[-1] == "2.00"


def test_a_step_is_explained_by_layer() -> None:
    line = decode_table.explained(OperationCounts({"fusion": 30, "while": 2}, {"fusion": 8}), layers=2, step_ms=4.0)
    assert line.startswith("40 operations a step (38 fusions; 8 in loops")
    assert "20.0 operations and 2.000 ms a layer, 100.0 us an operation" in line


def test_engine_and_bare_executable_on_a_tiny_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_hf_folder("llama_gqa_tied", tmp_path / "model")
    result = tmp_path / "result.json"
    status = decode.main(
        [
            "decode",
            f"--model={model}",
            "--dtype=float32",
            "--batches=1,3",
            "--rounds=2",
            "--prompt_tokens=5",
            "--tokens=6",
            "--prefill_chunk=16",
            "--kv_cache_gib=0.01",
            "--bandwidth_mb=4",
            "--reference_python=",
            "--explain",
            f"--json={result}",
        ]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "engine / bare executable" in printed.out
    assert printed.out.count(" operations a step (") == 2
    found = json.loads(result.read_text())
    assert [(row["batch"], row["name"]) for row in found["rows"]] == [(1, ENGINE), (1, BARE), (3, ENGINE), (3, BARE)]
    assert len(found["samples"]) == 8
    assert all(sample["decode"] > 0 for sample in found["samples"])
    # The bare run is the engine's own: same contexts, same tokens.
    assert found["same_tokens"] == {"1": 1.0, "3": 1.0}
    tables_and_layers = 96 * 48 + 2 * ((8 + 2 * 2) * 8 * 48 + 8 * 8 * 48 + 3 * 96 * 48)
    norms = (2 * 2 + 1) * 48
    assert found["weight_bytes"] == 4 * (tables_and_layers + norms)


def test_the_worker_says_what_it_lacks(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_worker.importlib.util, "find_spec", lambda name: None)
    with open(tmp_path / "answers", "w+") as answers, open(tmp_path / "orders", "w+") as orders:
        orders.write('{"name": "transformers", "prompts": [[1]], "tokens": 1}\n')
        orders.seek(0)
        reference_worker.main(tmp_path / "model.gguf", orders, answers)
        answers.seek(0)
        hello, failed = map(json.loads, answers)
    assert hello == {
        "there": {},
        "missing": {
            "transformers": "torch, transformers not installed",
            "llama.cpp": "llama_cpp not installed",
        },
    }
    assert "error" in failed


def test_a_reference_that_does_not_start(tmp_path: pathlib.Path) -> None:
    with pytest.raises(PreconditionError, match="does not start"):
        decode.Reference(str(tmp_path / "python"), tmp_path)


def test_activations_in_bfloat16_cost_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    assert activation_types.main(["activation_types", "--layers=2"]) == 0
    _, wide, narrow = capsys.readouterr().out.splitlines()
    assert (wide.split()[0], narrow.split()[0]) == ("float32", "bfloat16")
    assert 0 < float(wide.split()[1]) < float(narrow.split()[1]) < 0.1
    assert activation_types.main(["activation_types", "--layers=0"]) == 2


def test_matmul_forms_on_a_tiny_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_hf_folder("llama_gqa_tied", tmp_path / "model")
    assert matmul_forms.main(["matmul_forms", f"--model={model}", "--rows=1,2", "--dtypes=float32", "--vshards=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    one, two = lines[2].split(), lines[3].split()
    assert one[:2] == ["1", "float32"]
    assert one[5] == ("dot", "padded", "multiply_sum")[min(range(3), key=lambda i: float(one[2 + i]))] or (
        one[2:5].count(min(one[2:5], key=float)) > 1  # equal as printed
    )
    assert two[3] == "-"  # with two rows there is nothing to pad


@pytest.mark.parametrize(
    ("read", "flag", "message"),
    [
        (decode.read_options, "--batches=1,zero", "batches"),
        (decode.read_options, "--rounds=0", "rounds"),
        (decode.read_options, "--dtype=int8", "dtype"),
        (matmul_forms.read_options, "--rows=0", "rows"),
        (matmul_forms.read_options, "--dtypes=int8", "dtypes"),
        (startup.read_options, "--devices=0", "devices"),
        (compiling.read_options, "--streams=0", "streams"),
        (startup.read_options, "--unknown=1", "unknown"),
    ],
)
def test_wrong_flags(read: Callable[[Sequence[str]], object], flag: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read(["tool", flag])


def test_too_long_for_the_context(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_hf_folder("llama_gqa_tied", tmp_path / "model")
    assert decode.main(["decode", f"--model={model}", "--tokens=600"]) == 2
    assert "lower --tokens" in capsys.readouterr().err


def test_gaps_between_two_tokens() -> None:
    times = {"ended": [0.0, 1.0, 1.5], "stalled": [0.5, 2.0], "later": [9.0]}
    gaps = compiling.Gaps.between(times, {"ended"}, begin_s=1.0, end_s=5.0)
    # What ended stalls no more, and what stalls counts as far as it got.
    assert (gaps.tokens, gaps.longest, gaps.p50) == (3, 3000.0, 1500.0)
    assert gaps.mean == pytest.approx((500 + 1500 + 3000) / 3)
    rows = compiling.table({"before": gaps, "compiling": gaps}).splitlines()
    assert rows[-1] == "| compiling | 4 s | 1667 ms | 1500 ms | 3000 ms | 3000 ms | 1.0 |"


def test_streams_are_watched_while_another_layout_is_compiled(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "enable", lambda folder: None)  # of this process, which has other tests to run
    monkeypatch.setattr(compiling, "_WARM_UP_S", 0.1)
    monkeypatch.setattr(compiling, "_MAX_BATCH", 2)  # one bucket of decode steps less
    result = tmp_path / "result.json"
    flags = ["--layout=tp1x2", "--to=tp2", "--streams=2", "--quiet_s=0.5", "--kv_cache_gib=0.01"]
    assert compiling.main(["compiling", "--model=tiny-random", "--dtype=float32", *flags, f"--json={result}"]) == 0
    rows = json.loads(result.read_text())
    assert set(rows) == {"before", "compiling"}
    assert all(row["tokens"] > 0 and row["p50"] <= row["longest"] for row in rows.values())
    assert "| compiling |" in capsys.readouterr().out
