"""The body of a request: bounded in size and time, and an object of JSON."""

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.types import Receive, Scope

from nitsum_jax.runtime.streams.outputs import ClientLeftError
from nitsum_jax.server.http.errors import ApiError, of_validation

MAX_BODY_BYTES = 4 * 2**20
"""As long as a gRPC message may be."""

_DISCARDED_BYTES = 16 * 2**20  # of a body that is too long, so that its client lives to read why
_BODY_S = 60.0
_LONG_BYTES = 64 * 2**10  # longer ones take milliseconds to parse, which must not hold up the streams of others
_Model = TypeVar("_Model", bound=BaseModel)


async def read_object(scope: Scope, receive: Receive, kind: type[_Model]) -> _Model:
    """Reads the JSON object that a request brings.

    Args:
      scope: of the request.
      receive: brings the body.
      kind: of the object; long ones are read and checked beside the event loop.

    Raises:
      ApiError: there is none, it is too long, takes too long to come, is said to be something else, or is no
        object of the kind.
      ClientLeftError: the connection ended first.
    """
    headers = dict(scope["headers"])
    media = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if media != b"application/json":
        said = media.decode("latin-1")[:60] or "nothing"
        raise ApiError(415, f"the body is said to be {said}: send JSON with the header content-type: application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise ApiError(415, "compressed bodies are not supported: send the JSON as it is")
    try:
        async with asyncio.timeout(_BODY_S):
            body = await _read(receive)
    except TimeoutError:
        message = f"the body did not come within {_BODY_S:g} s: send it faster"
        raise ApiError(408, message, "timeout_error", headers=(("connection", "close"),)) from None
    if len(body) > _LONG_BYTES:
        return await asyncio.to_thread(_checked, kind, body)
    return _checked(kind, body)


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        chunk = message.get("body", b"")
        more = message.get("more_body", False)
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        else:
            chunks.clear()
            if size > MAX_BODY_BYTES + _DISCARDED_BYTES:
                break
    if size > MAX_BODY_BYTES:
        headers = (("connection", "close"),) if more else ()
        too_long = f"the body is too long: send at most {MAX_BODY_BYTES} bytes"
        raise ApiError(413, too_long, code="request_too_large", headers=headers)
    return b"".join(chunks)


def _checked(kind: type[_Model], body: bytes) -> _Model:
    try:
        return kind.model_validate(_parse(body))
    except ValidationError as error:
        raise of_validation(error) from None


def _parse(body: bytes) -> dict[str, Any]:
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    return data
