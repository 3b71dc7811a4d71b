"""Requests whose bytes are not a message: a clear INVALID_ARGUMENT instead of gRPC's UNKNOWN and a trace in the log.

The usual case is text that is not UTF-8, which protobuf refuses in string fields.
"""

import dataclasses
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

_ANSWER = "the request cannot be decoded: send a valid protobuf message, with text as UTF-8"


@dataclasses.dataclass(frozen=True, slots=True)
class _Undecodable:
    """Stands for a request that could not be decoded."""


class UndecodableRequests(grpc.aio.ServerInterceptor):
    """Answers undecodable requests of every method, whichever service it belongs to."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wraps decoder and behaviour of the method that is called; see grpc.aio.ServerInterceptor."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.request_streaming:
            if not inspect.isasyncgenfunction(handler.stream_stream):
                return handler
            return grpc.stream_stream_rpc_method_handler(
                _refusing_stream(handler.stream_stream),
                _marking(handler.request_deserializer),
                handler.response_serializer,
            )
        behaviour = handler.unary_stream or handler.unary_unary
        if not inspect.iscoroutinefunction(behaviour):
            return handler
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.unary_unary_rpc_method_handler
        return make(_refusing(behaviour), _marking(handler.request_deserializer), handler.response_serializer)


def _marking(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_mark(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError:
            return _Undecodable()

    return decode_or_mark


def _refusing(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(request: Any, context: grpc.aio.ServicerContext) -> Any:
        if isinstance(request, _Undecodable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _ANSWER)
        return await behaviour(request, context)

    return answer


def _refusing_stream(behaviour: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def answer(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        async def decoded() -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, _Undecodable):
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _ANSWER)
                yield request

        async for response in behaviour(decoded(), context):
            yield response

    return answer
