"""Refusals in the shape that clients of OpenAI's API understand."""

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
REALM: Final = "nitsum"


def error_body(message: str, kind: str, code: str | None) -> bytes:
    """The JSON of an error."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def refusal(error: NitsumError, *, browser: bool = False) -> tuple[int, bytes, Mapping[str, str]]:
    """HTTP status, body and headers for an error.

    Args:
      error: what happened.
      browser: whether a person looks at the page: then the browser asks for the key, as a password.
    """
    known = (entry[1:] for entry in _KINDS if isinstance(error, entry[0]))
    status, name, code = next(known, (500, "server_error", None))
    headers = {"content-type": "application/json"}
    if status == 401:
        headers["www-authenticate"] = f'{"Basic" if browser else "Bearer"} realm="{REALM}"'
    if isinstance(error, RateLimitedError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1e3))
    return status, error_body(one_line(str(error)), name, code), headers
