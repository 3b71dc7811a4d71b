"""What all endpoints have in common: a checked body, and an answer, whole or as a stream."""

import abc
import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.calls import Call
from nitsum_jax.runtime.streams.output import End, Piece, TokenWithLogprob
from nitsum_jax.runtime.streams.outputs import ClientLeftError, Outputs
from nitsum_jax.server.gateway import GatewayHeaders, gateway_headers
from nitsum_jax.server.http.body import read_object
from nitsum_jax.server.http.errors import ApiError, of_exception
from nitsum_jax.server.http.fields import Strict
from nitsum_jax.server.http.protocol import ARRIVAL
from nitsum_jax.server.state import ServerState

_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_Request = TypeVar("_Request", bound=Strict)


@dataclasses.dataclass(slots=True)
class Whole:
    """An output that is collected before it is sent."""

    texts: list[str] = dataclasses.field(default_factory=list)
    told: list[TokenWithLogprob] = dataclasses.field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.texts.append(piece.text)
        self.told += piece.told
        self.end = piece.end


class WholeWriter(Protocol):
    """How one API writes the outputs of one request, when all are there."""

    # ruff: noqa: D102
    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]: ...


class EventWriter(Protocol):
    """How one API writes them as a stream."""

    def note(self, outputs: Outputs) -> None: ...  # looks at them, before the next events are asked for
    def opening(self) -> str: ...  # events before the first piece
    def events(self, index: int, piece: Piece) -> str: ...
    def closing(self, outputs: Outputs) -> str: ...  # events behind the last piece
    def failure(self, error: ApiError) -> str: ...  # the last events of a stream that fails


@dataclasses.dataclass(frozen=True, slots=True)
class Planned:
    """What answers a request.

    Attributes:
      calls: outputs to be made.
      writer: of the answer.
      events: writes it as a stream instead; None: it is sent whole.
    """

    calls: Sequence[Call]
    writer: WholeWriter
    events: EventWriter | None = None


class Endpoint(abc.ABC, Generic[_Request]):
    """An ASGI application that generates."""

    kind: type[_Request]

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; see ASGI.

        Raises:
          ApiError, NitsumError: refused before anything was sent.
          ClientLeftError: the client no longer waits for the answer.
        """
        begun_s = time.monotonic()
        self._state.admitting()
        request = await read_object(scope, receive, self.kind)
        arrival_s = scope.get(ARRIVAL, begun_s)
        backend = self._state.admitting()  # it may have begun to drain meanwhile
        planned = await self.plan(request, backend, gateway_headers(scope["headers"]))
        backend = self._state.admitting()
        with Outputs(planned.calls, backend, arrival_s) as outputs:
            async with _watched(receive, outputs):
                if planned.events is not None:
                    what = f"{scope['method']} {scope['path']}"
                    await _stream(outputs, planned.events, send, what, backend)
                else:
                    await _whole(outputs, planned.writer, len(planned.calls), send)

    @abc.abstractmethod
    async def plan(self, request: _Request, backend: Backend, asked: GatewayHeaders) -> Planned:
        """What answers the request, with what a gateway asks for in its headers."""


class JsonEndpoint(Generic[_Request]):
    """Answers one object with another, without the engine; an ASGI application."""

    def __init__(
        self,
        state: ServerState,
        kind: type[_Request],
        answer: Callable[[_Request, Backend], Awaitable[BaseModel]],
    ) -> None:
        """Answers requests of a kind.

        Args:
          state: of the server.
          kind: of the requests.
          answer: to one of them.
        """
        self._state = state
        self._kind = kind
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        self._state.present()
        request = await read_object(scope, receive, self._kind)
        backend = self._state.present()
        check_model(getattr(request, "model", None), backend.model)
        await _send_json(send, (await self._answer(request, backend)).model_dump())


def check_model(asked: str | None, model: ServedModel) -> None:
    """Refuses a request for another model than the one that is served."""
    if asked is not None and asked != model.name:
        message = f"The model `{asked[:80]}` does not exist: this server has `{model.name}`"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _send_json(send: Send, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole(outputs: Outputs, writer: WholeWriter, count: int, send: Send) -> None:
    wholes = [Whole() for _ in range(count)]
    while outputs.alive:
        for index, piece in await outputs.next():
            wholes[index].add(piece)
    await _send_json(send, writer.whole(wholes, outputs))


async def _stream(outputs: Outputs, writer: EventWriter, send: Send, what: str, backend: Backend) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    writer.note(outputs)
    opening = writer.opening()
    if opening:
        await send({"type": "http.response.body", "body": opening.encode(), "more_body": True})
    try:
        while outputs.alive:
            # One write for all tokens of a step; a client that reads slowly gets fewer, larger events.
            pieces = await outputs.next()
            writer.note(outputs)
            events = "".join([writer.events(index, piece) for index, piece in pieces])
            if events:
                await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
        last = writer.closing(outputs)
    except ClientLeftError:
        raise
    except Exception as error:  # the status is long gone; clients raise on such an event
        last = writer.failure(of_exception(error, what, backend.router.retry_after_s()))
    await send({"type": "http.response.body", "body": last.encode()})


@contextlib.asynccontextmanager
async def _watched(receive: Receive, outputs: Outputs) -> AsyncIterator[None]:
    """Tells the outputs when the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        outputs.leave()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
