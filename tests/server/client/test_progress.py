"""Who waits for a layout is told how far it is: in time whatever the server does, and in nobody's way."""

import asyncio
import io
import itertools
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from nitsum_jax.runtime.progress import ProgressLine, told
from nitsum_jax.server.client.admin import main_async as admin
from nitsum_jax.server.client.generate import main_async as generate
from nitsum_jax.server.client.progress import watched
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import running, says, until

Capture = pytest.CaptureFixture[str]


class FakeClock:
    """Time that passes only while somebody waits; the work is done at its end."""

    def __init__(self, end_s: float) -> None:
        self.now_s = 100.0
        self.end_s = 100.0 + end_s

    def now(self) -> float:
        return self.now_s

    async def wait(self, work: "asyncio.Future[Any]", seconds: float) -> None:
        self.now_s = min(self.now_s + seconds, self.end_s)
        await asyncio.sleep(0)
        if self.now_s == self.end_s:
            await asyncio.wait({work})

    async def work(self) -> str:
        while self.now_s < self.end_s:
            await asyncio.sleep(0)
        return "done"


def told_while_waiting(seconds: float, look: Callable[[], Awaitable[str]], *, rewritten: bool) -> Sequence[str]:
    """What is told at which second of some work, as "at SECOND: text"."""
    clock = FakeClock(seconds)
    texts: list[str] = []

    class Line(ProgressLine):
        def tell(self, text: str) -> None:
            texts.append(f"at {clock.now() - 100:g}: {text}")

    async def scenario() -> None:
        line = Line("tool", rewritten=rewritten)
        assert await watched(clock.work(), "compiling tp4", look, line, clock) == "done"

    asyncio.run(scenario())
    return texts


async def no_answer() -> str:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def fault() -> str:
    raise ZeroDivisionError


async def news() -> str:
    return "1 of 2 executables ready"


@pytest.mark.parametrize("look", [no_answer, fault, news])
@pytest.mark.parametrize("rewritten", [False, True])
def test_it_is_told_within_two_seconds_and_every_five(look: Callable[[], Awaitable[str]], rewritten: bool) -> None:
    times = [float(text.split()[1][:-1]) for text in told_while_waiting(240, look, rewritten=rewritten)]
    assert 0 < times[0] <= 2
    assert max(b - a for a, b in itertools.pairwise([*times, 240.0])) <= 5
    assert min(b - a for a, b in itertools.pairwise(times)) >= (0.5 if rewritten else 4)  # and no flood


def test_the_news_are_in_the_line() -> None:
    lines = told_while_waiting(6, news, rewritten=False)
    assert lines == [
        "at 1: compiling tp4 for 1 s: 1 of 2 executables ready",
        "at 5: compiling tp4 for 5 s: 1 of 2 executables ready",
    ]


def test_what_is_quick_is_not_told() -> None:
    assert told_while_waiting(0.5, news, rewritten=True) == []


def test_who_stops_waiting_leaves_nothing_behind(capsys: Capture) -> None:
    async def scenario() -> None:
        line = ProgressLine("tool", rewritten=True)
        clock = FakeClock(1e9)
        work: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(watched(work, "compiling tp4", no_answer, line, clock))
        while "compiling" not in capsys.readouterr().err:
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert work.cancelled()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scenario())
    assert capsys.readouterr().err.endswith("\r\x1b[K")


def test_an_error_of_the_call_is_an_error_of_the_waiting() -> None:
    async def failing() -> None:
        raise LookupError("no such layout")

    async def scenario() -> None:
        with pytest.raises(LookupError, match="no such layout"):
            await watched(failing(), "compiling tp4", no_answer, ProgressLine("tool"))

    asyncio.run(scenario())


def test_a_line_on_a_terminal_is_written_anew_and_never_wraps(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    line = ProgressLine("tool", rewritten=True)
    line.tell("compiling a layout of many parts")
    line.tell("done")
    line.clear()
    line.clear()
    assert capsys.readouterr().err == "\r\x1b[Ktool: compiling a …\r\x1b[Ktool: done\r\x1b[K"
    plain = ProgressLine("tool", rewritten=False)
    plain.tell("compiling a layout of many parts")
    plain.clear()
    assert capsys.readouterr().err == "tool: compiling a layout of many parts\n"


def test_a_layout_is_found_in_whatever_form_the_user_wrote_it() -> None:
    state = nitsum_pb2.GetLayoutResponse(
        devices=["a", "b", "c", "d"],
        compiling=nitsum_pb2.Compiling(
            layouts=[
                nitsum_pb2.PendingLayout(layout="tp4", stage="switching", needed=2, compiled=2, ready=2),
                nitsum_pb2.PendingLayout(layout="tp2x2", stage="compiling", needed=4, compiled=3, ready=1),
            ],
            making=[nitsum_pb2.Making(activity="compiling", tp=2, phase="decode", size=32, seconds=125.5)],
        ),
    )
    work = "compiling decode of 32 at TP 2 for 2 min 5 s"
    assert told(state.compiling, "tp2+tp2", 4) == f"1 of 4 executables ready, {work}"
    assert told(state.compiling, "tp2/chat+tp2", 4) == f"1 of 4 executables ready, {work}"
    assert told(state.compiling, "tp4", 4) == f"all 2 executables ready, switching, {work}"
    assert told(state.compiling, "tp1x4", 4) == work
    assert told(state.compiling, "nonsense", 4) == ""


def test_the_first_layout_plan_is_not_waited_for_in_silence(capsys: Capture) -> None:
    async def scenario() -> None:
        async with running(says("word ")) as run:
            run.engine.hold()
            flags = ["--prompt=a", "--max_tokens=3", "--layout_plan=0:tp2x2,1:tp4"]
            call = asyncio.create_task(generate(["nitsum-generate", f"--server={run.address}", *flags]))
            await asyncio.sleep(1.3)  # a real clock, once: the line is there before two seconds
            first = capsys.readouterr()
            run.engine.release()
            assert await call == 0
        assert first.out == ""
        assert first.err == (
            "nitsum-generate: compiling tp2x2 for 1 s: "
            "1 of 4 executables ready, compiling decode of 32 at TP 4 for 1 s\n"
        )

    asyncio.run(scenario())
    out, err = capsys.readouterr()
    assert out.startswith("word"[:1])
    assert "switched tp1x4 -> tp2x2" in err


def test_the_administrator_is_told_too_and_may_leave(capsys: Capture) -> None:
    async def scenario() -> None:
        async with running(says("word ")) as run:
            run.engine.hold()
            argv = ["nitsum-admin", "force", "tp4", f"--server={run.address}", "--json"]
            call = asyncio.create_task(admin(argv))
            await asyncio.sleep(1.3)
            err = capsys.readouterr().err
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.sleep(0.2)  # until the server knows
            run.engine.release()
            await until(lambda: str(run.engine.layout()) == "tp4")  # what was asked for is done
        assert "nitsum-admin: switching to tp4 for 1 s: 1 of 4 executables ready" in err

    asyncio.run(scenario())
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_does_not_come_into_the_midst_of_an_answer_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)

    async def scenario() -> None:
        async with running(says("word ", end=False), step_s=0.01) as run:
            flags = ["--prompt=a", "--max_tokens=40", "--layout_plan=10:tp4"]
            assert await generate(["nitsum-generate", f"--server={run.address}", *flags]) == 0

    asyncio.run(scenario())
    before, _, rest = screen.getvalue().partition("nitsum-generate: switched tp1x4 -> tp4")
    assert before.endswith("\n")
    answer = before + rest.partition("\n")[2]
    assert answer.replace("\n", "").startswith("word " * 8)


def test_the_wire_tells_what_is_compiled() -> None:
    async def scenario() -> None:
        async with running(says("word ")) as run:
            idle = (await run.stub.GetLayout(nitsum_pb2.GetLayoutRequest())).compiling
            assert (len(idle.making), idle.queued, len(idle.layouts)) == (0, 0, 0)
            run.engine.hold()
            call = run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4", prepare=True))
            asking = asyncio.ensure_future(call)
            while not (state := (await run.stub.GetLayout(nitsum_pb2.GetLayoutRequest())).compiling).layouts:
                await asyncio.sleep(0.01)
            assert state.queued == 7
            assert state.layouts[0] == nitsum_pb2.PendingLayout(
                layout="tp4", stage="compiling", needed=4, compiled=2, ready=1, seconds=3.5
            )
            assert state.making[0] == nitsum_pb2.Making(
                activity="compiling", tp=4, phase="decode", size=32, seconds=1.25
            )
            run.engine.release()
            await asking

    asyncio.run(scenario())
