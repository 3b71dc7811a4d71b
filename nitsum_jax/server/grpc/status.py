"""Errors to gRPC status codes: one line each, never a trace."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

import grpc
from grpc.aio import AbortError, ServicerContext

from nitsum_jax.errors import (
    InvalidInputError,
    NitsumError,
    OverloadedError,
    PreconditionError,
    UnavailableError,
    one_line,
)
from nitsum_jax.runtime.errors import DeadlineError, GenerationError
from nitsum_jax.server.security.errors import DeniedError, RateLimitedError, UnauthenticatedError

_LOG = logging.getLogger(__name__)


_CODES: Final = (
    (InvalidInputError, grpc.StatusCode.INVALID_ARGUMENT),
    (PreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (DeniedError, grpc.StatusCode.PERMISSION_DENIED),
)


def status_of(error: NitsumError) -> grpc.StatusCode:
    """The status code that stands in the docstring of the error's class; INTERNAL for a class that has none."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


@contextlib.asynccontextmanager
async def reported(context: ServicerContext, call: str, retry_after_s: Callable[[], float]) -> AsyncIterator[None]:
    """Ends the call with the right status when the body raises.

    Args:
      context: of the call.
      call: name of the call, for the log.
      retry_after_s: asked for the hint that goes with RESOURCE_EXHAUSTED.
    """
    try:
        yield
    except OverloadedError as error:
        # The first key is what gRPC's own retry policy reads; the second is for people and other clients.
        pause_s = error.retry_after_s if isinstance(error, RateLimitedError) else retry_after_s()
        pause_ms = str(round(pause_s * 1e3))
        trailing = (("grpc-retry-pushback-ms", pause_ms), ("retry-after-ms", pause_ms))
        await context.abort(status_of(error), one_line(str(error)), trailing)
    except NitsumError as error:
        await context.abort(status_of(error), one_line(str(error)))
    except DeadlineError as error:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, one_line(str(error)))
    except GenerationError as error:
        _LOG.error("%s: %s", call, one_line(str(error)))
        await context.abort(grpc.StatusCode.INTERNAL, one_line(str(error)))
    except AbortError:
        raise
    except Exception as error:
        _LOG.exception("%s failed", call)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}): see the server's log")
