"""The line about compiling: for the start of an engine, and for a layout that a notebook asked for."""

import pytest

from nitsum_jax.engine.executables.progress import CompileProgress, LayoutProgress, Making
from nitsum_jax.runtime.progress import ProgressLine, StartProgress, Waiting

NEWS = CompileProgress(
    making=(Making("compiling", 2, "prefill", 128, 3.0),),
    queued=4,
    layouts=(LayoutProgress("tp2x2", "compiling", 4, 2, 1, 3.0),),
)


@pytest.mark.parametrize(("rewritten", "every_s"), [(True, 0.5), (False, 10.0)])
def test_a_wait_is_told_at_its_pace(rewritten: bool, every_s: float, capsys: pytest.CaptureFixture[str]) -> None:
    now = [50.0]
    line = ProgressLine("tool", rewritten=rewritten)
    waiting = Waiting("compiling", line, now=lambda: now[0], plain_every_s=10.0)
    times = []
    for tick in range(120):
        now[0] = 50.0 + tick / 2
        waiting.show("news")
        if capsys.readouterr().err:
            times.append(tick / 2)
    assert times == [1.0 + k * every_s for k in range(len(times))]
    assert times[-1] > 59.5 - every_s


def test_a_start_tells_what_it_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    now = [50.0]
    progress = StartProgress(ProgressLine("tool", rewritten=False), now=lambda: now[0])
    progress(NEWS)
    assert capsys.readouterr().err == ""
    now[0] += 7
    progress(NEWS)
    assert capsys.readouterr().err == (
        "tool: compiling for 7 s: 1 of 4 executables ready, compiling prefill of 128 at TP 2 for 3 s\n"
    )
