"""The guard in front of an HTTP application, and limits on what a client may send; plain ASGI."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from nitsum_jax.errors import NitsumError
from nitsum_jax.server.security.guard import Guard, Need
from nitsum_jax.server.security.http_errors import error_body, refusal

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 32 * 2**10
HEALTH_PATHS = ("/livez", "/readyz", "/health")
"""What load balancers ask; answered without a key."""


def need_of(method: str, path: str) -> Need:
    """What a request is, as far as its rights are concerned. What is not known needs a key."""
    if path in HEALTH_PATHS:
        return Need.NOTHING
    if path == "/metrics" or path == "/dashboard" or path.startswith("/dashboard/"):
        return Need.MONITOR
    if path == "/admin" or path.startswith("/admin/"):
        return Need.ADMIN
    return Need.GENERATE if method == "POST" else Need.IDENTITY


class HttpGuard:
    """Lets the requests through that the guard admits, as the current call; the others get 401, 403 or 429."""

    def __init__(self, app: App, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        path = scope["path"]
        need = need_of(scope["method"], path)
        client = scope.get("client")
        admission = self._guard.admit(
            need,
            _header(scope, b"authorization"),
            "an unknown client" if client is None else str(client[0]),
            _header(scope, b"traceparent") or "",
        )
        try:
            admission.__enter__()
        except NitsumError as error:
            status, body, headers = refusal(error, browser=path.startswith("/dashboard"))
            await _answer(send, status, body, headers)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            admission.__exit__(None, None, None)


class HttpLimits:
    """Refuses requests whose headers or body are too large, the latter also where their length is not told."""

    def __init__(
        self, app: App, *, max_body_bytes: int = MAX_BODY_BYTES, max_header_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        """Stands before `app`.

        Args:
          app: what is protected.
          max_body_bytes: longest body.
          max_header_bytes: names and values of all headers together.
        """
        self._app = app
        self._max_body = max_body_bytes
        self._max_headers = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self._max_headers:
            await _refuse(send, 431, f"the headers are longer than {self._max_headers} bytes: send fewer")
            return
        told = _header(scope, b"content-length") or "0"
        too_long = f"the body is longer than {self._max_body} bytes: send a shorter prompt"
        if not told.isdecimal() or len(told) > 18 or int(told) > self._max_body:
            await _refuse(send, 413, too_long)
            return
        seen = 0
        answered = False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise _TooLongError
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _TooLongError:
            if not answered:
                await _refuse(send, 413, too_long)


class _TooLongError(Exception):
    """The body went past its limit."""


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _refuse(send: Send, status: int, message: str) -> None:
    headers = {"content-type": "application/json", "connection": "close"}
    await _answer(send, status, error_body(message, "invalid_request_error", "too_large"), headers)


async def _answer(send: Send, status: int, body: bytes, headers: Any) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
