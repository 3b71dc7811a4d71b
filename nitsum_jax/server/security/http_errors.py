"""Refusals in the shapes that clients of OpenAI's and Anthropic's APIs understand."""

import json
import math
from collections.abc import Mapping
from typing import Final

from nitsum_jax.errors import (
    InvalidInputError,
    NitsumError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
    one_line,
)
from nitsum_jax.server.security.errors import DeniedError, RateLimitedError, UnauthenticatedError

_KINDS: Final = (
    # class, HTTP status, OpenAI's type and code
    (UnauthenticatedError, 401, "invalid_request_error", "invalid_api_key"),
    (DeniedError, 403, "permission_error", "permission_denied"),
    (RateLimitedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (OverloadedError, 429, "rate_limit_error", "queue_full"),
    (InvalidInputError, 400, "invalid_request_error", None),
    (PreconditionError, 400, "invalid_request_error", "failed_precondition"),
    (UnavailableError, 503, "server_error", "unavailable"),
)
_ANTHROPIC: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
REALM: Final = "nitsum"


def error_body(message: str, kind: str, code: str | None) -> bytes:
    """The JSON of an error."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def anthropic_body(message: str, status: int) -> bytes:
    """The JSON of an error in the shape that clients of Anthropic's API understand."""
    kind = _ANTHROPIC.get(status, "invalid_request_error" if status < 500 else "api_error")
    return json.dumps({"type": "error", "error": {"type": kind, "message": message}}).encode()


def speaks_anthropic(path: str) -> bool:
    """Whether a path is of Anthropic's API."""
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def refusal(error: NitsumError, *, browser: bool = False, path: str = "") -> tuple[int, bytes, Mapping[str, str]]:
    """HTTP status, body and headers for an error.

    Args:
      error: what happened.
      browser: whether a person looks at the page: then the browser asks for the key, as a password.
      path: that was asked for; its API decides about the shape.
    """
    known = (entry[1:] for entry in _KINDS if isinstance(error, entry[0]))
    status, name, code = next(known, (500, "server_error", None))
    headers = {"content-type": "application/json"}
    if status == 401:
        headers["www-authenticate"] = f'{"Basic" if browser else "Bearer"} realm="{REALM}"'
    if isinstance(error, RateLimitedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1e3))
    message = one_line(str(error))
    body = anthropic_body(message, status) if speaks_anthropic(path) else error_body(message, name, code)
    return status, body, headers
