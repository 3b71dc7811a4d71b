"""The sandbox that chat templates run in: jinja2's immutable one, with an end to how much and how long.

A template comes with the model, a message comes from anybody. Neither may make the server write without end.
"""

import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.runtime
import jinja2.sandbox

MAX_CHARS = 4_000_000
"""Longest text that a template may write, and longest value that it may make by repeating one."""
MAX_SECONDS = 5.0
_MAX_BITS = 4096
_WIDE_FORMAT = re.compile(r"%[^A-Za-z%]*(?:\d{5,}|\*)")


class TooMuchError(Exception):
    """The template wrote or computed more than it may."""


class _Budget(threading.local):
    end_s: float | None = None  # rendering happens in one thread from beginning to end


_BUDGET = _Budget()


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Looks at the clock at every call, and at the size of a product before it is made."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call(  # noqa: D102  as jinja2's
        __self,  # noqa: N805  a template may pass arguments of any name
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        _check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Computes left operator right, if the result is of a sane size."""
        _check_time()
        if operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, str | bytes | list | tuple) and isinstance(times, int):
                    _check(len(sized) * times <= MAX_CHARS)
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int):
                _check(left.bit_length() * max(right, 1) <= _MAX_BITS)
        elif isinstance(left, str | bytes):
            _check(not _WIDE_FORMAT.search(left if isinstance(left, str) else left.decode("latin-1")))
        return super().call_binop(context, operator, left, right)


def render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The text of a template.

    Raises:
      TooMuchError: it is longer than MAX_CHARS, or takes longer than MAX_SECONDS.
      Exception: whatever the template raises.
    """
    _BUDGET.end_s = time.monotonic() + MAX_SECONDS
    try:
        pieces = []
        length = 0
        for piece in template.generate(**variables):
            length += len(piece)
            _check(length <= MAX_CHARS)
            _check_time()
            pieces.append(piece)
        return "".join(pieces)
    finally:
        _BUDGET.end_s = None


def _check_time() -> None:
    if _BUDGET.end_s is not None and time.monotonic() > _BUDGET.end_s:
        raise TooMuchError(f"it takes longer than {MAX_SECONDS:g} s")


def _check(fits: bool) -> None:
    if not fits:
        raise TooMuchError(f"it makes more than {MAX_CHARS} characters")
