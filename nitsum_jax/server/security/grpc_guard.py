"""The guard in front of every gRPC method, streaming or not."""

import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from nitsum_jax.errors import NitsumError, one_line
from nitsum_jax.runtime.callers import sane_id
from nitsum_jax.server.gateway import fairness_id, header_pairs
from nitsum_jax.server.grpc.status import status_of
from nitsum_jax.server.security.errors import RateLimitedError, UnauthenticatedError
from nitsum_jax.server.security.guard import Guard, Need

_NEEDS = {
    "/grpc.health.v1.Health/Check": Need.NOTHING,
    "/grpc.health.v1.Health/Watch": Need.NOTHING,
    "/jetstream_proto.Orchestrator/HealthCheck": Need.NOTHING,
    "/jetstream_proto.Orchestrator/Decode": Need.GENERATE,
    "/nitsum.v1.GenerationService/Generate": Need.GENERATE,
    "/nitsum.v1.GenerationService/Embed": Need.GENERATE,
    "/nitsum.v1.GenerationService/SetLayout": Need.ADMIN,
}
_ADMIN = "/nitsum.v1.AdminService/"


def need_of(method: str) -> Need:
    """What a gRPC method is, as far as its rights are concerned. What is not known needs a key."""
    return Need.ADMIN if method.startswith(_ADMIN) else _NEEDS.get(method, Need.IDENTITY)


class GrpcGuard(grpc.aio.ServerInterceptor):
    """Asks the guard about every call before its method runs; must be the first interceptor."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wraps the method that is called; see grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        need = need_of(handler_call_details.method)
        if handler is None or need is Need.NOTHING:
            return handler
        behaviour, make = _parts(handler)
        if inspect.isasyncgenfunction(behaviour):
            wrapped: Callable[..., Any] = self._streaming(behaviour, need)
        elif inspect.iscoroutinefunction(behaviour):
            wrapped = self._plain(behaviour, need)
        else:
            # Would run on a thread, where no guard stands; there is no such method here, and there shall be none.
            raise TypeError(f"{handler_call_details.method} is not asynchronous: the guard cannot stand before it")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)

    def _plain(self, behaviour: Callable[..., Awaitable[Any]], need: Need) -> Callable[..., Awaitable[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
            admitted = await self._enter(need, context)
            with admitted:
                return await behaviour(request, context)

        return answer

    def _streaming(self, behaviour: Callable[..., AsyncIterator[Any]], need: Need) -> Callable[..., AsyncIterator[Any]]:
        async def answer(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            admitted = await self._enter(need, context)
            with admitted:
                async for message in behaviour(request, context):
                    yield message

        return answer

    async def _enter(self, need: Need, context: grpc.aio.ServicerContext) -> Any:
        """The admission, entered; ends the call if there is none."""
        metadata = {str(key).lower(): value for key, value in context.invocation_metadata() or ()}
        admission = self._guard.admit(
            need,
            _text(metadata.get("authorization")),
            _host(context.peer()),
            _text(metadata.get("traceparent")) or "",
            sane_id(_text(metadata.get("x-request-id"))),
            fairness_id(header_pairs(context.invocation_metadata())),
        )
        try:
            admission.__enter__()
        except RateLimitedError as error:
            pause_ms = str(math.ceil(error.retry_after_s * 1e3))
            trailing = (("grpc-retry-pushback-ms", pause_ms), ("retry-after-ms", pause_ms))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, one_line(str(error)), trailing)
        except UnauthenticatedError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, one_line(str(error)))
        except NitsumError as error:
            await context.abort(status_of(error), one_line(str(error)))
        return _Entered(admission)


class _Entered:
    """Leaves a context that was entered before."""

    def __init__(self, entered: Any) -> None:
        self._entered = entered

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> Any:
        return self._entered.__exit__(*error)


def _parts(handler: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if handler.request_streaming:
        if handler.response_streaming:
            return handler.stream_stream, grpc.stream_stream_rpc_method_handler
        return handler.stream_unary, grpc.stream_unary_rpc_method_handler
    if handler.response_streaming:
        return handler.unary_stream, grpc.unary_stream_rpc_method_handler
    return handler.unary_unary, grpc.unary_unary_rpc_method_handler


def _text(value: object) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _host(peer: str) -> str:
    """The host of gRPC's peer text, such as "ipv4:127.0.0.1:5000" or "ipv6:%5B::1%5D:5000", as HTTP calls it."""
    host = peer.rpartition(":")[0].replace("%5B", "[").replace("%5D", "]")
    return host.removeprefix("ipv4:").removeprefix("ipv6:").strip("[]") or peer
