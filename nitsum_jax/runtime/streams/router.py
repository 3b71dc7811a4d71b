"""From the engine's thread to asyncio streams.

Concurrency. The engine calls `StreamRouter.sink` on its own thread, once per step, with the deltas of all
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
from nitsum_jax.errors import NitsumError
from nitsum_jax.runtime.callers import current_caller
from nitsum_jax.runtime.records import RequestObserver, ServedRequest

_ENDS = (None, FinishReason.STOP, FinishReason.LENGTH)
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

    def __init__(self, record: ServedRequest, wake: asyncio.Event | None = None) -> None:
        self.record = record
        self._buffer: deque[TokenDelta] = deque()
        self._wake = wake or asyncio.Event()
        self.finished = False
        self.cut = False  # finished without the engine

    def put(self, delta: TokenDelta) -> None:
        """Adds a delta; nothing may follow one with a finish reason."""
        self._buffer.append(delta)
        self.record.take(delta)
        self.finished = delta.finish_reason is not None
        self._wake.set()

    async def next(self) -> list[TokenDelta]:
        """All deltas that have come since the last call, at least one; waits for it."""
        await self._wake.wait()
        self._wake.clear()
        return self.take()

    def take(self) -> list[TokenDelta]:
        """The deltas that have come since the last call, perhaps none.

        An end that is an error comes by itself: it is raised, and must not take the text before it along.
        """
        deltas = list(self._buffer)
        self._buffer.clear()
        if len(deltas) > 1 and deltas[-1].finish_reason not in _ENDS:
            self._buffer.append(deltas.pop())
            self._wake.set()
        return deltas


class StreamRouter:
    """Hands the deltas of every step to the streams of their requests."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic) -> None:
        self._loop = loop
        self._clock = clock
        self._streams: dict[str, DeltaStream] = {}
        self.observer: RequestObserver | None = None  # set once the model is loaded
        self._finish_interval_s: float | None = None
        self._last_finish_s: float | None = None

    def sink(self, deltas: Sequence[TokenDelta]) -> None:
        """Takes the deltas of one step, on the thread of the engine; never blocks, never raises."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and no stream is left
            self._loop.call_soon_threadsafe(self._dispatch, tuple(deltas))

    def admitted(self, request_id: str, now_s: float) -> None:
        """An instance takes a request; called on any thread."""
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.record.admitted_s = now_s

    def stopped(self, request_id: str) -> None:
        """The front end that reads a stream ends its output itself: at a stop string."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.record.finish is None:
            stream.record.finish = FinishReason.STOP

    @contextlib.contextmanager
    def stream(
        self,
        engine: _Submits,
        request: Request,
        wake: asyncio.Event | None = None,
        arrival_s: float | None = None,
    ) -> Iterator[DeltaStream]:
        """Submits a request and yields its stream; leaving early, for whatever reason, cancels it in the engine.

        Args:
          engine: that is to run it.
          request: to be run.
          wake: set whenever the stream has a delta; one of its own if None.
          arrival_s: when the request arrived, on the clock of the engine; now if None.

        Raises:
          NitsumError: what `engine.submit` raises.
        """
        caller = current_caller()
        record = ServedRequest(
            request.id,
            request.tier,
            len(request.prompt_ids),
            self._clock() if arrival_s is None else arrival_s,
            client=caller.client,
            traceparent=caller.traceparent,
            call_id=caller.call_id,
            fairness_id=caller.fairness_id,
            ttft_target_ms=request.ttft_ms,
            tpot_target_ms=request.tpot_ms,
        )
        stream = DeltaStream(record, wake)
        # Registered first: the engine may have tokens before submit returns.
        self._streams[request.id] = stream
        submitted = False
        try:
            engine.submit(request)
            submitted = True
            yield stream
        except NitsumError as error:
            if not submitted and self.observer is not None:
                self.observer.refused(request.tier, error)
            raise
        finally:
            del self._streams[request.id]
            if submitted:
                if stream.cut or not stream.finished:
                    engine.cancel(request.id)
                self._note_end(record)

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

    def open_records(self) -> list[ServedRequest]:
        """Those of the streams that have a handler."""
        return [stream.record for stream in self._streams.values()]

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

    def _note_end(self, record: ServedRequest) -> None:
        if record.ended_s is None:
            record.ended_s = self._clock()
        if record.finish is None:  # the handler was cancelled, or failed on its own: the rest was not read
            record.finish = FinishReason.CANCELLED
        if self.observer is not None:
            self.observer.ended(record)

    def _note_ends(self, count: int) -> None:
        now = self._clock()
        if self._last_finish_s is not None:
            interval = (now - self._last_finish_s) / count
            before = interval if self._finish_interval_s is None else self._finish_interval_s
            self._finish_interval_s = before + _SMOOTHING * (interval - before)
        self._last_finish_s = now
