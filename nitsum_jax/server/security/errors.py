"""Refusals because of the caller."""

from nitsum_jax.errors import NitsumError, OverloadedError


class UnauthenticatedError(NitsumError):
    """The call carries no valid API key (UNAUTHENTICATED, HTTP 401)."""


class DeniedError(NitsumError):
    """The caller is known, and may not do this (PERMISSION_DENIED, HTTP 403)."""


class RateLimitedError(OverloadedError):
    """The caller has used up what it may use for now (RESOURCE_EXHAUSTED, HTTP 429)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        """Args: the line for the user, and when trying again may succeed, in seconds."""
        super().__init__(message)
        self.retry_after_s = retry_after_s
