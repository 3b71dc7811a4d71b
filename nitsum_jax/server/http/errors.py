"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, one line each, never a trace."""

import dataclasses
import json
import logging
import math
from typing import Any

from pydantic import ValidationError

from nitsum_jax.errors import (
    ContextLengthError,
    InvalidInputError,
    NitsumError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
    one_line,
)
from nitsum_jax.runtime.errors import DeadlineError, GenerationError
from nitsum_jax.server.http.fields import UNKNOWN, UNSUPPORTED
from nitsum_jax.server.http.wording import told
from nitsum_jax.server.security.errors import DeniedError, RateLimitedError, UnauthenticatedError

_LOG = logging.getLogger(__name__)
_MAX_PARAM = 100

INVALID = "invalid_request_error"


@dataclasses.dataclass(frozen=True, slots=True)
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
      status: of HTTP.
      message: one line for the user.
      type: OpenAI's kind of error.
      param: field that is wrong, such as "messages[0].content".
      code: short name that a program can look at.
      headers: beyond content type and length.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> bytes:
        """The JSON of the answer."""
        error = {"message": one_line(self.message), "type": self.type, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def of_validation(error: ValidationError) -> ApiError:
    """What pydantic found, as an answer; of several findings it has the first."""
    first = error.errors(include_url=False, include_input=False)[0]
    context = first.get("ctx") or {}
    kind = first["type"]
    field = (context["field"],) if "field" in context else ()
    param = _path(first["loc"] + field)[:_MAX_PARAM]
    message = told(kind, param, first["msg"], context)
    return ApiError(400, message, param=param or None, code=kind if kind in (UNKNOWN, UNSUPPORTED) else None)


def of_exception(error: Exception, what: str, retry_after_s: float) -> ApiError:
    """The answer that stands for an exception of a handler.

    Args:
      error: as raised.
      what: the call, for the log.
      retry_after_s: the hint that goes with 429 and 503.
    """
    match error:
        case ApiError():
            return error
        case RateLimitedError():
            headers = _retry(error.retry_after_s)
            return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=headers)
        case OverloadedError():
            return ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=_retry(retry_after_s))
        case UnavailableError():
            return ApiError(503, str(error), "server_error", code="unavailable", headers=_retry(retry_after_s))
        case UnauthenticatedError():
            return ApiError(401, str(error), code="invalid_api_key")
        case DeniedError():
            return ApiError(403, str(error), "permission_error", code="permission_denied")
        case ContextLengthError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case InvalidInputError():
            return ApiError(400, str(error))
        case PreconditionError():
            return ApiError(400, str(error), code="not_possible_here")
        case DeadlineError():
            return ApiError(408, str(error), "timeout_error", code="deadline_exceeded")
        case NitsumError() | GenerationError():
            _LOG.error("%s: %s", what, one_line(str(error)))
            return ApiError(500, str(error), "server_error", code="generation_failed")
        case _:
            _LOG.error("%s failed", what, exc_info=error)
            message = f"internal error ({type(error).__name__}): see the server's log"
            return ApiError(500, message, "server_error", code="internal_error")


def _retry(after_s: float) -> tuple[tuple[str, str], ...]:
    # OpenAI's client reads the first, other clients the second.
    return (("retry-after-ms", str(round(after_s * 1e3))), ("retry-after", str(max(1, math.ceil(after_s)))))


def _path(loc: tuple[Any, ...]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path
