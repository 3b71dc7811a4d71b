"""POST /v1/completions and /v1/chat/completions, as ASGI applications."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.streams.outputs import ClientLeftError, Outputs
from nitsum_jax.server.http.body import read_object
from nitsum_jax.server.http.errors import ApiError, of_exception, of_validation
from nitsum_jax.server.http.openai.plan import RequestPlan, plan_chat, plan_completion
from nitsum_jax.server.http.openai.requests import ChatRequest, CompletionRequest, Generation
from nitsum_jax.server.http.openai.shapes import DONE, AnswerShape, ChatShape, CompletionShape, StreamedUsage, Whole
from nitsum_jax.server.state import ServerState

_JSON = (b"content-type", b"application/json")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_Request = TypeVar("_Request", bound=Generation)


class Endpoint(Generic[_Request]):
    """What the two have in common: body, plan, outputs, and the answer as one object or as a stream."""

    kind: type[_Request]

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; see ASGI.

        Raises:
          ApiError, NitsumError: refused before anything was sent.
          ClientLeftError: the client no longer waits for the answer.
        """
        arrival_s = time.monotonic()
        self._state.admitting()
        request = await read_object(scope, receive, self._checked)
        backend = self._state.admitting()  # it may have begun to drain meanwhile
        plan = await self.plan(request, backend)
        shape = self.shape(request, plan, backend)
        backend = self._state.admitting()
        with Outputs(plan.calls, backend, arrival_s) as outputs:
            async with _watched(receive, outputs):
                if request.stream:
                    what = f"{scope['method']} {scope['path']}"
                    await _stream(outputs, shape, request.include_usage, send, what, backend)
                else:
                    await _whole(outputs, shape, len(plan.calls), send)

    async def plan(self, request: _Request, backend: Backend) -> RequestPlan:
        """What answers the request."""
        raise NotImplementedError

    def shape(self, request: _Request, plan: RequestPlan, backend: Backend) -> AnswerShape:
        """How the answer is written."""
        raise NotImplementedError

    def _checked(self, data: dict[str, Any]) -> _Request:
        try:
            return self.kind.model_validate(data)
        except ValidationError as error:
            raise of_validation(error) from None


class Completions(Endpoint[CompletionRequest]):
    """/v1/completions."""

    kind = CompletionRequest

    async def plan(self, request: CompletionRequest, backend: Backend) -> RequestPlan:
        """See plan_completion."""
        return await plan_completion(request, backend)

    def shape(self, request: CompletionRequest, plan: RequestPlan, backend: Backend) -> AnswerShape:
        """See CompletionShape."""
        return CompletionShape(plan, backend.model.tokenizer.token_bytes, request.logprobs, _streamed_usage(request))


class ChatCompletions(Endpoint[ChatRequest]):
    """/v1/chat/completions."""

    kind = ChatRequest

    async def plan(self, request: ChatRequest, backend: Backend) -> RequestPlan:
        """See plan_chat."""
        return await plan_chat(request, backend)

    def shape(self, request: ChatRequest, plan: RequestPlan, backend: Backend) -> AnswerShape:
        """See ChatShape."""
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return ChatShape(plan, backend.model.tokenizer.token_bytes, logprobs, _streamed_usage(request))


def _streamed_usage(request: Generation) -> StreamedUsage:
    options = request.stream_options
    if options is None or not options.include_usage:
        return StreamedUsage.NOWHERE
    return StreamedUsage.EVERYWHERE if options.continuous_usage_stats else StreamedUsage.AT_THE_END


async def _whole(outputs: Outputs, shape: AnswerShape, count: int, send: Send) -> None:
    wholes = [Whole() for _ in range(count)]
    while outputs.alive:
        for index, piece in await outputs.next():
            wholes[index].add(piece)
    body = json.dumps(shape.whole(wholes, outputs)).encode()
    headers = [_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    outputs: Outputs, shape: AnswerShape, include_usage: bool, send: Send, what: str, backend: Backend
) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
    shape.note(outputs)
    opening = shape.opening()
    if opening:
        await send({"type": "http.response.body", "body": opening.encode(), "more_body": True})
    try:
        while outputs.alive:
            # One write for all tokens of a step; a client that reads slowly gets fewer, larger events.
            pieces = await outputs.next()
            shape.note(outputs)
            events = "".join([shape.events(index, piece) for index, piece in pieces])
            if events:
                await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
        last = shape.usage_event(outputs).encode() if include_usage else b""
    except ClientLeftError:
        raise
    except Exception as error:  # the status is long gone; OpenAI's client raises on such an event
        failure: ApiError = of_exception(error, what, backend.router.retry_after_s())
        last = b"data: " + failure.body() + b"\n\n"
    await send({"type": "http.response.body", "body": last + DONE})


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
