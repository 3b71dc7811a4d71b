import json
import pathlib

import pytest

from benchmarks.server import frontend, frontend_server
from benchmarks.server.frontend_clients import Window


def test_both_front_ends_bring_all_tokens(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "result.json"
    flags = ["--streams=3", "--tokens=30", "--step_ms=5", "--rounds=1", f"--json={result}"]
    assert frontend.main(["frontend", *flags]) == 0
    rows = json.loads(result.read_text())
    assert [(row["front_end"], row["streams"], row["complete"]) for row in rows] == [("grpc", 3, 3), ("http", 3, 3)]
    for row in rows:
        assert 0 < row["alone"] <= 1.1 * 3 / 0.005  # 29 waits for 30 tokens
        assert row["rate"] > 0
        assert row["cpu_us"] > 0
    out = capsys.readouterr().out
    assert out.startswith("| front end | streams |")
    assert out.count("\n| ") == 2


def test_the_engine_keeps_its_pace() -> None:
    assert frontend_server.alone(streams=2, tokens=20, step_s=0.005) <= 1.1 * 2 / 0.005 * 20 / 19


def test_a_window_lasts_while_all_streams_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 14.0])
    monkeypatch.setattr("benchmarks.server.frontend_clients.time.perf_counter", lambda: next(now))
    window = Window(streams=2, tokens=9)
    window.begin()
    window.add(5)  # the other one has not begun
    window.begin()
    window.add(8)
    window.end(9)
    window.add(7)  # the first one has ended
    window.end(8)
    assert window.as_json() == {"tokens_per_s": 2.0, "seconds": 4.0, "complete": 1}


@pytest.mark.parametrize("flag", ["--streams=0", "--streams=many", "--streams=", "--tokens=1"])
def test_wrong_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontend.main(["frontend", flag]) == 2
    assert flag.split("=")[0].strip("-") in capsys.readouterr().err
