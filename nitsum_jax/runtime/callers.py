"""The caller of the call that is being answered: set by the security layer of a front end, read behind it."""

import contextlib
import contextvars
import dataclasses
import re
from collections.abc import Callable, Iterator


def _any_number(outputs: int) -> None:
    """There is no limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Caller:
    """What the front end knows about the caller.

    Attributes:
      client: name of its API key; empty without one.
      tiers: latency tiers that it may use; None: all.
      admin: whether it may change the cell.
      traceparent: W3C trace context of the client; empty if it sent none.
      call_id: of the call, by which clients and proxies know it (x-request-id); empty without one.
      fairness_id: whom a gateway says the call is for; empty if none does.
      more: called with the number of outputs that the call asks for beside the first; raises if the caller may not
        have that many.
    """

    client: str = ""
    tiers: tuple[str, ...] | None = None
    admin: bool = False
    traceparent: str = ""
    call_id: str = ""
    fairness_id: str = ""
    more: Callable[[int], None] = dataclasses.field(default=_any_number, compare=False)


_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def sane_id(text: str | None) -> str:
    """An id that a client gave its call, if it may stand in headers and logs; otherwise nothing."""
    return text if text is not None and _SANE_ID.fullmatch(text) else ""


NOBODY = Caller()
"""Work that no front end let in, such as a test's or the server's own."""

_CURRENT: contextvars.ContextVar[Caller] = contextvars.ContextVar("nitsum_caller", default=NOBODY)


def current_caller() -> Caller:
    """Whose call this task answers; NOBODY outside of any."""
    return _CURRENT.get()


@contextlib.contextmanager
def calling(caller: Caller) -> Iterator[None]:
    """Makes `caller` the current one for the body, and for tasks that it starts."""
    token = _CURRENT.set(caller)
    try:
        yield
    finally:
        # A generator that is closed from outside its task has another context, which ends with it.
        with contextlib.suppress(ValueError):
            _CURRENT.reset(token)
