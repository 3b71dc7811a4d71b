"""HTTP for operators: health, metrics, dashboard, administration. An application mounts these, or they stand alone."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable

from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from nitsum_jax.errors import InvalidInputError, NitsumError, UnavailableError
from nitsum_jax.server.operations.dashboard.feed import Feed
from nitsum_jax.server.operations.metrics.vllm_names import OURS, named
from nitsum_jax.server.operations.monitor import Operations
from nitsum_jax.server.operations.profiling import Profiler
from nitsum_jax.server.security.http_errors import refusal
from nitsum_jax.server.state import ServerPhase, ServerState

_PAGE = pathlib.Path(__file__).parent / "dashboard" / "page.html"
_RETRY_S = 2
# The page brings all it needs; nothing else may run in it, and it may connect only to this server.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_PLAIN = {"cache-control": "no-store"}


@dataclasses.dataclass
class OperatorViews:
    """What the routes look at: there from the start of the process, complete once the model is loaded.

    Attributes:
      state: phase of the server.
      profiler: records traces.
      operations: None until the model is loaded.
      names: whose names the metrics have.
    """

    state: ServerState
    profiler: Profiler
    operations: Operations | None = None
    names: str = OURS

    def present(self) -> Operations:
        """Raises UnavailableError until the model is loaded."""
        if self.operations is None:
            raise UnavailableError("the server is starting: try again when /readyz answers 200")
        return self.operations


def ops_routes(views: OperatorViews) -> list[BaseRoute]:
    """Routes /livez, /readyz, /health, /metrics, /dashboard, /dashboard/events, /admin/profile.

    They trust every caller that reaches them: the guard (security.http_guard.HttpGuard) stands before the application.
    """

    async def live(request: Request) -> Response:
        return Response("alive\n", media_type="text/plain", headers=_PLAIN)

    async def ready(request: Request) -> Response:
        if views.state.phase is ServerPhase.SERVING:
            return Response("ready\n", media_type="text/plain", headers=_PLAIN)
        headers = {**_PLAIN, "retry-after": str(_RETRY_S)}
        return Response(f"{views.state.phase.value}\n", 503, media_type="text/plain", headers=headers)

    async def metrics(request: Request) -> Response:
        try:
            operations = views.present()
            await operations.look()
            registry = named(operations.registry, views.names)
        except UnavailableError as error:
            return _refused(error)
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={**_PLAIN, "content-type": kind})

    async def profile(request: Request) -> Response:
        try:
            text = request.query_params.get("seconds", "5")
            folder = await views.profiler.record(_number("seconds", text))
        except NitsumError as error:
            return _refused(error)
        return _json({"folder": str(folder)})

    return [
        Route("/livez", live),
        Route("/readyz", ready),
        Route("/health", ready),
        Route("/metrics", metrics),
        *dashboard_routes(lambda: views.present().feed),
        Route("/admin/profile", profile, methods=["POST"]),
    ]


def dashboard_routes(feed: Callable[[], Feed]) -> list[BaseRoute]:
    """Routes /dashboard and /dashboard/events.

    Args:
      feed: what the page shows; raises UnavailableError while there is none.
    """
    page = _PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page_headers = {**_PAGE_HEADERS, "content-security-policy": _POLICY.format(digest)}

    async def dashboard(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def events(request: Request) -> Response:
        try:
            stream = feed().events()
            first = await anext(stream)
        except NitsumError as error:
            return _refused(error)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(_after(first, stream), media_type="text/event-stream", headers=headers)

    return [Route("/dashboard", dashboard), Route("/dashboard/events", events)]


async def _after(first: str, rest: AsyncGenerator[str]) -> AsyncIterator[str]:
    async with contextlib.aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"{name}={text!r} is not a number")
    return value


def _refused(error: NitsumError) -> Response:
    status, body, headers = refusal(error)
    extra = {"retry-after": str(_RETRY_S)} if status == 503 else {}
    return Response(body, status, headers={**headers, **extra})


def _json(value: object) -> Response:
    return Response(json.dumps(value) + "\n", media_type="application/json", headers=_PLAIN)
