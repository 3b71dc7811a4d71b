"""The HTTP application: its routes, and around them request ids and errors in OpenAI's shape."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nitsum_jax.runtime.callers import sane_id
from nitsum_jax.runtime.streams.outputs import ClientLeftError
from nitsum_jax.server.http.answering import JsonEndpoint, check_model
from nitsum_jax.server.http.anthropic.endpoint import Messages, count_tokens
from nitsum_jax.server.http.anthropic.requests import CountRequest
from nitsum_jax.server.http.errors import ApiError, of_exception
from nitsum_jax.server.http.openai.embeddings import Embeddings
from nitsum_jax.server.http.openai.endpoints import ChatCompletions, Completions
from nitsum_jax.server.http.openapi import openapi
from nitsum_jax.server.http.responding.endpoint import Responses
from nitsum_jax.server.http.tokens import (
    DetokenizeRequest,
    TokenizeRequest,
    detokenize,
    tokenize,
    version,
)
from nitsum_jax.server.security.http_errors import speaks_anthropic
from nitsum_jax.server.state import ServerPhase, ServerState

REQUEST_ID = b"x-request-id"
_STARTING_RETRY_S = 5.0


def build_app(
    state: ServerState, routes: Sequence[BaseRoute] = (), wrap: Callable[[ASGIApp], ASGIApp] | None = None
) -> ASGIApp:
    """The application.

    Args:
      state: of the server that it is a face of.
      routes: more of them.
      wrap: put around all routes, inside of the handling of errors: it may raise ApiError.
    """

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(state)]})

    async def model(request: Request) -> Response:
        check_model(request.path_params["model"], state.present().model)
        return JSONResponse(_model(state))

    async def told_version(request: Request) -> Response:
        return JSONResponse(version().model_dump())

    async def live(request: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def ready(request: Request) -> Response:
        serving = state.phase is ServerPhase.SERVING
        return JSONResponse({"status": "ready" if serving else state.phase.value}, 200 if serving else 503)

    async def document(request: Request) -> Response:
        return JSONResponse(openapi(state.backend))

    router: ASGIApp = Router(
        [
            Route("/v1/models", models),
            Route("/v1/models/{model:path}", model),
            Route("/v1/completions", Completions(state), methods=["POST"]),
            Route("/v1/chat/completions", ChatCompletions(state), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(state), methods=["POST"]),
            Route("/v1/responses", Responses(state), methods=["POST"]),
            Route("/v1/messages", Messages(state), methods=["POST"]),
            Route("/v1/messages/count_tokens", JsonEndpoint(state, CountRequest, count_tokens), methods=["POST"]),
            Route("/tokenize", JsonEndpoint(state, TokenizeRequest, tokenize), methods=["POST"]),
            Route("/detokenize", JsonEndpoint(state, DetokenizeRequest, detokenize), methods=["POST"]),
            Route("/version", told_version),
            Route("/health/live", live),
            Route("/health/ready", ready),
            Route("/openapi.json", document),
            *routes,
        ],
        redirect_slashes=False,
    )
    return Frame(router if wrap is None else wrap(router), state)


def _model(state: ServerState) -> dict[str, Any]:
    name = state.present().model.name
    return {"id": name, "object": "model", "created": state.ready_at, "owned_by": "nitsum-jax"}


class Frame:
    """Gives every request an id, and every exception an answer.

    The id that a client sends as x-request-id is kept if it is sane; otherwise one is made. It comes back with the
    response, and stands in scope["state"]["request_id"] for what is inside.
    """

    def __init__(self, inner: ASGIApp, state: ServerState) -> None:
        self._inner = inner
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; see ASGI."""
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == REQUEST_ID), None)
        request_id = sane_id(given) or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        scope["app"] = self  # makes Starlette's router raise instead of answering in its own way
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message = {**message, "headers": [*message["headers"], (REQUEST_ID, request_id.encode())]}
            await send(message)

        try:
            await self._inner(scope, receive, named)
        except ClientLeftError:
            return
        except HTTPException as error:
            await _answer(_of_router(error, scope), named, scope)
        except Exception as error:
            what = f"{scope['method']} {scope['path'][:100]}"
            failure = of_exception(error, what, self._retry_after_s())
            if begun:
                raise  # nothing can be said any more: the server cuts the connection
            await _answer(failure, named, scope)

    def _retry_after_s(self) -> float:
        backend = self._state.backend
        return _STARTING_RETRY_S if backend is None else backend.router.retry_after_s()


def _of_router(error: HTTPException, scope: Scope) -> ApiError:
    where = f"{scope['method']} {scope['path'][:100]}"
    if error.status_code == 404:
        return ApiError(404, f"Unknown request URL: {where}", code="unknown_url")
    headers = tuple((error.headers or {}).items())
    allowed = ", ".join(value for name, value in headers if name.lower() == "allow")
    return ApiError(
        error.status_code, f"Not allowed: {where}; use {allowed}", code="method_not_allowed", headers=headers
    )


async def _answer(error: ApiError, send: Send, scope: Scope) -> None:
    body = error.anthropic_body() if speaks_anthropic(scope["path"]) else error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
