"""Waits for a call of a client and tells how far the server is meanwhile."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc.aio

from nitsum_jax.runtime.progress import TICK_S, ProgressLine, Waiting, told
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

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


async def watched(call: Awaitable[_T], what: str, look: Look, line: ProgressLine, clock: Clock | None = None) -> _T:
    """Waits for a call, and tells how far it is while that takes longer than a moment.

    The line comes from here, not from the server: it comes in time also if that answers late, with the older news.

    Args:
      call: what is waited for; it is cancelled if the waiting is.
      what: is waited for, in words, such as "compiling tp4".
      look: asks for the news; "" if there are none.  What it raises is taken for no news.
      line: takes the texts; it is clear in the end.
      clock: for tests.
    """
    clock = _RealClock() if clock is None else clock
    waiting = Waiting(what, line, now=clock.now)
    working = asyncio.ensure_future(call)
    looking: asyncio.Future[str] | None = None
    asked, news = clock.now(), ""
    try:
        while not working.done():
            if looking is not None and not looking.done() and clock.now() - asked >= _ASKING_S:
                looking.cancel()
            if looking is None or looking.done():
                looking, asked = asyncio.ensure_future(look()), clock.now()
            await clock.wait(working, TICK_S)
            if looking.done() and not looking.cancelled():
                news = news if looking.exception() is not None else looking.result()
            if not working.done():
                waiting.show(news)
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
        return told(state.compiling, layout, len(state.devices))

    return look
