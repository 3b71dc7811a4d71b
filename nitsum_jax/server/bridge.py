"""From the engine's thread to asyncio streams.

Concurrency, told once. The engine calls `Bridge.sink` on its own thread, once per step, with the deltas of all
requests. The sink makes one `call_soon_threadsafe` for the whole step: the cost of crossing threads does not grow with
the number of streams. Everything else here runs on the event loop: the deltas are put in the buffers of their streams,
and each stream wakes its handler. A handler that is slow (its client does not read) finds all deltas of the meantime at
once; its buffer is bounded by the `max_tokens` of its request, so no reader can make memory grow without bound.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from nitsum_jax.engine.request import FinishReason, Request, TokenDelta

_FIRST_RETRY_S = 1.0  # before any request has ended there is nothing to estimate from
_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 10.0
_SMOOTHING = 0.2


class _Submits(Protocol):
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...


class DeltaStream:
    """The deltas of one request, in order, for one consumer on the event loop.

    Several streams may share the event that wakes their consumer; it then calls `take` on each of them.
    """

    def __init__(self, wake: asyncio.Event | None = None) -> None:
        self._buffer: deque[TokenDelta] = deque()
        self._wake = wake or asyncio.Event()
        self.finished = False
        self.cut = False  # finished without the engine

    def put(self, delta: TokenDelta) -> None:
        """Adds a delta; nothing may follow one with a finish reason."""
        self._buffer.append(delta)
        self.finished = delta.finish_reason is not None
        self._wake.set()

    async def next(self) -> list[TokenDelta]:
        """All deltas that have come since the last call, at least one; waits for it."""
        await self._wake.wait()
        self._wake.clear()
        return self.take()

    def take(self) -> list[TokenDelta]:
        """All deltas that have come since the last call, perhaps none."""
        deltas = list(self._buffer)
        self._buffer.clear()
        return deltas


class Bridge:
    """Hands the deltas of every step to the streams of their requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = loop
        self._clock = clock
        self._streams: dict[str, DeltaStream] = {}
        self._finish_interval_s: float | None = None
        self._last_finish_s: float | None = None

    def sink(self, deltas: Sequence[TokenDelta]) -> None:
        """Takes the deltas of one step, on the thread of the engine; never blocks, never raises."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, nobody is left to tell
            self._loop.call_soon_threadsafe(self._dispatch, tuple(deltas))

    @contextlib.contextmanager
    def stream(self, engine: _Submits, request: Request, wake: asyncio.Event | None = None) -> Iterator[DeltaStream]:
        """Submits a request and yields its stream; leaving early, for whatever reason, cancels it in the engine.

        Args:
          engine: that is to run it.
          request: to be run.
          wake: set whenever the stream has a delta; one of its own if None.

        Raises:
          NitsumError: what `engine.submit` raises.
        """
        stream = DeltaStream(wake)
        # Registered first: the engine may have tokens before submit returns.
        self._streams[request.id] = stream
        submitted = False
        try:
            engine.submit(request)
            submitted = True
            yield stream
        finally:
            del self._streams[request.id]
            if submitted and (stream.cut or not stream.finished):
                engine.cancel(request.id)

    def cut_off(self) -> None:
        """Ends all streams with CANCELLED: the server stops, whatever the engine still does. On the event loop."""
        for request_id, stream in self._streams.items():
            if not stream.finished:
                stream.cut = True
                stream.put(TokenDelta(request_id, (), self._clock(), FinishReason.CANCELLED))

    @property
    def open_streams(self) -> int:
        """How many streams have a handler."""
        return len(self._streams)

    def retry_after_s(self) -> float:
        """When a place in the queue may be free: the smoothed time between the ends of requests, 0.1 to 10 s."""
        estimate = _FIRST_RETRY_S if self._finish_interval_s is None else self._finish_interval_s
        return min(max(estimate, _MIN_RETRY_S), _MAX_RETRY_S)

    def _dispatch(self, deltas: tuple[TokenDelta, ...]) -> None:
        ended = 0
        for delta in deltas:
            ended += delta.finish_reason is not None
            stream = self._streams.get(delta.request_id)
            # Else its handler has left, and the engine learns of it by cancel; or it was cut off.
            if stream is not None and not stream.finished:
                stream.put(delta)
        if ended:
            self._note_ends(ended)

    def _note_ends(self, count: int) -> None:
        now = self._clock()
        if self._last_finish_s is not None:
            interval = (now - self._last_finish_s) / count
            before = interval if self._finish_interval_s is None else self._finish_interval_s
            self._finish_interval_s = before + _SMOOTHING * (interval - before)
        self._last_finish_s = now
