"""The guard in front of an HTTP application; plain ASGI."""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from nitsum_jax.errors import NitsumError
from nitsum_jax.server.gateway import fairness_id
from nitsum_jax.server.security.guard import Guard, Need
from nitsum_jax.server.security.http_errors import refusal

HEALTH_PATHS = ("/livez", "/readyz", "/health", "/health/live", "/health/ready")
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

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
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
            _header(scope, b"authorization") or _anthropic_key(scope),
            "an unknown client" if client is None else str(client[0]),
            _header(scope, b"traceparent") or "",
            scope.get("state", {}).get("request_id", ""),
            fairness_id(scope["headers"]),
        )
        try:
            admission.__enter__()
        except NitsumError as error:
            status, body, headers = refusal(error, browser=path.startswith("/dashboard"), path=path)
            await _answer(send, status, body, headers)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            admission.__exit__(None, None, None)


def _anthropic_key(scope: Scope) -> str | None:
    """The key as Anthropic's clients send it."""
    key = _header(scope, b"x-api-key")
    return None if key is None else f"Bearer {key}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def _answer(send: Send, status: int, body: bytes, headers: Mapping[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
