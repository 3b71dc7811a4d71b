"""Errors that a user can act on.

Every error that reaches a user is one line about what is wrong and what to do.  The front ends choose the status by
its class: the gRPC code is in each docstring.
"""


class NitsumError(Exception):
    """Base of all errors raised on purpose; the message is one line, fit for a user."""


class InvalidInputError(NitsumError, ValueError):
    """The request, flag or file itself is wrong, whatever the state of the server (INVALID_ARGUMENT)."""


class ContextLengthError(InvalidInputError):
    """Prompt and output together are longer than the model, or its KV cache, can take (INVALID_ARGUMENT)."""


class PreconditionError(NitsumError, RuntimeError):
    """Right in itself, but not possible on this cell or in its present state (FAILED_PRECONDITION)."""


class OverloadedError(NitsumError, RuntimeError):
    """A bounded queue is full; trying again later may succeed (RESOURCE_EXHAUSTED)."""


class UnavailableError(NitsumError, RuntimeError):
    """The server is starting, draining or closed (UNAVAILABLE)."""


MAX_DETAIL = 400
"""Longest status text, in characters: a status travels in HTTP/2 headers, whose size is limited."""


def one_line(text: str, limit: int = MAX_DETAIL) -> str:
    """The text without line breaks, cut to `limit` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 3] + "..."
