"""Decides about every call, whichever protocol it comes by: who the caller is, and whether it may call."""

import base64
import binascii
import contextlib
import dataclasses
import enum
import logging
import time
from collections.abc import Callable, Iterator
from typing import Final

from nitsum_jax.errors import NitsumError
from nitsum_jax.runtime.callers import Caller, calling
from nitsum_jax.server.security.errors import DeniedError, RateLimitedError, UnauthenticatedError
from nitsum_jax.server.security.keys import ApiKey, KeyRing, KeyRole
from nitsum_jax.server.security.limits import Limits, OutputSlot

_LOG = logging.getLogger(__name__)
_LONGEST_HEADER = 512
REASONS: Final[dict[type[NitsumError], str]] = {
    UnauthenticatedError: "no_key",
    DeniedError: "not_allowed",
    RateLimitedError: "rate_limit",
}
"""What the metrics call the refusals."""


class Need(enum.Enum):
    """What a call is, as far as its rights are concerned."""

    NOTHING = "nothing"  # health checks: they tell nothing but whether the server is up
    IDENTITY = "identity"  # any user: models, layout, reflection
    GENERATE = "generate"  # counts against the limits
    MONITOR = "monitor"  # metrics and dashboard
    ADMIN = "admin"  # changes the cell or looks into the process


_MAY = {
    KeyRole.USER: {Need.NOTHING, Need.IDENTITY, Need.GENERATE},
    KeyRole.MONITOR: {Need.NOTHING, Need.MONITOR},
    KeyRole.ADMIN: set(Need),
}


@dataclasses.dataclass(frozen=True, slots=True)
class AccessPolicy:
    """What holds on one port.

    Attributes:
      keys: None: callers are not asked who they are.
      admin: whether this port offers administration at all.
      streams_per_client: most outputs at a time for one address, where there are no keys, or of one key that
        has no limit of its own; None: no limit.
      behind_gateway: whether the fairness id that comes along tells clients of one address apart. Only a gateway can be
        trusted with that: anybody else could name a new one for each call.
    """

    keys: KeyRing | None = None
    admin: bool = False
    streams_per_client: int | None = None
    behind_gateway: bool = False


class Guard:
    """Applies a policy; only the event loop uses it."""

    def __init__(
        self,
        policy: AccessPolicy,
        *,
        limits: Limits | None = None,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """Takes the policy of one port.

        Args:
          policy: what holds.
          limits: shared by the ports of a server; own ones if None.
          on_refused: called with the kind of every refusal, for the metrics.
        """
        self.policy = policy
        self._limits = limits or Limits(time.monotonic)
        self._on_refused = on_refused

    @contextlib.contextmanager
    def admit(
        self,
        need: Need,
        authorization: str | None,
        address: str,
        traceparent: str = "",
        call_id: str = "",
        fairness_id: str = "",
    ) -> Iterator[Caller]:
        """Lets a call in for the body, as the current caller's, or refuses it.

        Args:
          need: what the call is.
          authorization: the value of the header, such as "Bearer nk_...".
          address: of the client, for limits and log.
          traceparent: W3C trace context that came along.
          call_id: what the client, or a proxy, calls the call.
          fairness_id: whom a gateway says the call is for.

        Raises:
          UnauthenticatedError: no valid key.
          DeniedError: the key, or this port, is not for this.
          RateLimitedError: the client has used up its share.
        """
        try:
            key = self._authenticate(need, authorization)
            self._authorize(need, key)
            named = self.policy.behind_gateway and fairness_id
            held = self._hold(need, key, f"the fairness id {fairness_id!r}" if named else address)
            place = held.__enter__()
        except NitsumError as error:
            self._refused(address, error)
            raise

        def more(outputs: int) -> None:
            try:
                if place is not None:
                    place.more(outputs)
            except NitsumError as error:
                self._refused(address, error)
                raise

        admin = self.policy.admin and (key is None or key.role is KeyRole.ADMIN)
        name, tiers = ("", None) if key is None else (key.name, key.tiers)
        with contextlib.ExitStack() as stack:
            stack.push(held)
            caller = Caller(
                name,
                tiers,
                admin,
                traceparent if len(traceparent) <= _LONGEST_HEADER else "",
                call_id,
                fairness_id,
                more,
            )
            stack.enter_context(calling(caller))
            yield caller

    def _refused(self, address: str, error: NitsumError) -> None:
        _LOG.info("refused a call of %s: %s", address, error)
        if self._on_refused is not None and type(error) in REASONS:
            self._on_refused(REASONS[type(error)])

    def _authenticate(self, need: Need, authorization: str | None) -> ApiKey | None:
        if self.policy.keys is None or need is Need.NOTHING:
            return None
        secret = _secret_of(authorization)
        if secret is None:
            raise UnauthenticatedError("this server needs an API key: send the header 'Authorization: Bearer KEY'")
        key = self.policy.keys.find(secret)
        if key is None:
            raise UnauthenticatedError("the API key is not valid: check it, or ask for a new one")
        return key

    def _authorize(self, need: Need, key: ApiKey | None) -> None:
        if need is Need.ADMIN and not self.policy.admin:
            raise DeniedError(
                "administration is not available on this port: use the admin port (--admin_port), or start the server "
                "with --api_keys and use an admin key"
            )
        if key is not None and need not in _MAY[key.role]:
            raise DeniedError(f"the API key {key.name!r} has the role {key.role}, which may not do this")

    def _hold(
        self, need: Need, key: ApiKey | None, client: str
    ) -> contextlib.AbstractContextManager[OutputSlot | None]:
        if need is not Need.GENERATE:
            return contextlib.nullcontext()
        if key is None:
            return self._limits.use(client, None, self.policy.streams_per_client)
        concurrent = key.concurrent if key.concurrent is not None else self.policy.streams_per_client
        return self._limits.use(f"the API key {key.name!r}", key.requests_per_minute, concurrent)


def _secret_of(authorization: str | None) -> str | None:
    """The key in the header: as a bearer token, or as the password of a browser that asked for one."""
    if not authorization or len(authorization) > _LONGEST_HEADER:
        return None
    scheme, _, value = authorization.strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer":
        return value or None
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2] or None
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None
