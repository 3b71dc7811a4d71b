"""A line on stderr while a command waits for a layout: within two seconds, and again at least every five."""

import asyncio
import shutil
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc.aio

from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.server import cli
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

_ANEW = "\r\x1b[K"  # to the start of the line, and all of it away
_TICK_S = 0.5
_FIRST_S = 1.0
_PLAIN_EVERY_S = 4.0
_ASKING_S = 30.0  # an answer that takes longer is given up and asked for again

_T = TypeVar("_T")
Look = Callable[[], Awaitable[str]]


class Clock(Protocol):
    """Time as the waiting sees it."""

    def now(self) -> float:
        """Seconds, of any origin."""

    async def wait(self, work: "asyncio.Future[Any]", seconds: float) -> None:
        """Returns when the work is done, or after so many seconds."""


class _RealClock:
    def now(self) -> float:
        return time.monotonic()

    async def wait(self, work: "asyncio.Future[Any]", seconds: float) -> None:
        await asyncio.wait({work}, timeout=seconds)


class ProgressLine:
    """Where progress is told: one line that is written anew on a terminal, else line after line."""

    def __init__(self, name: str, *, rewritten: bool | None = None, say: Callable[[str], None] = cli.err) -> None:
        """Says nothing yet.

        Args:
          name: of the tool, in front of every line.
          rewritten: whether there is one line only; None: if stderr is a terminal.
          say: takes the lines where they are not rewritten.
        """
        self._name = name
        self.rewritten = sys.stderr.isatty() if rewritten is None else rewritten
        self._say = say
        self._there = False

    def tell(self, text: str) -> None:
        """Shows a text; it replaces the one before, if that can be."""
        line = f"{self._name}: {text}"
        if not self.rewritten:
            self._say(line)
            return
        width = max(2, shutil.get_terminal_size().columns - 1)
        _write(_ANEW + (line if len(line) <= width else line[: width - 1] + "…"))
        self._there = True

    def clear(self) -> None:
        """Makes room for what comes next."""
        if self._there:
            _write(_ANEW)
            self._there = False


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


async def watched(call: Awaitable[_T], what: str, look: Look, line: ProgressLine, clock: Clock | None = None) -> _T:
    """Waits for a call, and shows its progress while that takes longer than a moment.

    The line comes from here, not from the server: it comes in time also if that answers late, with the older news.

    Args:
      call: what is waited for; it is cancelled if the waiting is.
      what: is waited for, in words, such as "compiling tp4".
      look: asks for the news; "" if there are none.  What it raises is taken for no news.
      line: takes the texts; it is clear in the end.
      clock: for tests.
    """
    clock = _RealClock() if clock is None else clock
    begin = clock.now()
    due = begin + _FIRST_S
    working = asyncio.ensure_future(call)
    looking: asyncio.Future[str] | None = None
    asked, news = begin, ""
    try:
        while not working.done():
            if looking is not None and not looking.done() and clock.now() - asked >= _ASKING_S:
                looking.cancel()
            if looking is None or looking.done():
                looking, asked = asyncio.ensure_future(look()), clock.now()
            await clock.wait(working, _TICK_S)
            if looking.done() and not looking.cancelled():
                news = news if looking.exception() is not None else looking.result()
            now = clock.now()
            if not working.done() and now >= due:
                line.tell(f"{what} for {seconds(now - begin)}" + (f": {news}" if news else ""))
                due = now + (_TICK_S if line.rewritten else _PLAIN_EVERY_S)
        return working.result()
    finally:
        line.clear()
        working.cancel()
        if looking is not None:
            looking.cancel()
            await asyncio.wait({looking})
        await asyncio.wait({working})


def compiling(stub: nitsum_pb2_grpc.GenerationServiceStub, layout: str) -> Look:
    """A look at how far a layout is that was asked for."""

    async def look() -> str:
        try:
            state = await stub.GetLayout(nitsum_pb2.GetLayoutRequest())
        except grpc.aio.AioRpcError:
            return ""  # the call that is waited for will say what is wrong
        return told(state, layout)

    return look


def told(state: nitsum_pb2.GetLayoutResponse, layout: str) -> str:
    """One line about what is compiled, "" if nothing is.

    Args:
      state: from the server.
      layout: as the user wrote it; the server has a form of its own.
    """
    try:
        layout = str(parse_layout(layout, len(state.devices)))
    except NitsumError:
        return ""  # likewise
    parts = []
    for one in [one for one in state.compiling.layouts if one.layout == layout][:1]:
        if one.stage == "compiling":
            parts.append(f"{one.ready} of {one.needed} executables ready")
        else:
            parts.append(f"all {one.needed} executables ready, switching")
    for making in state.compiling.making:
        parts.append(
            f"{making.activity} {making.phase} of {making.size} at TP {making.tp} for {seconds(making.seconds)}"
        )
    return ", ".join(parts)


def seconds(value: float) -> str:
    """A time for people: 41 s, 2 min 5 s."""
    whole = int(value)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"
