"""Waiting for a change of the layout: a caller that leaves does not undo it."""

import asyncio
import concurrent.futures
from typing import Any

from nitsum_jax.errors import UnavailableError


async def outcome(future: "concurrent.futures.Future[Any]") -> Any:
    """The report of a change that an engine was asked for, also of one that others wait for no more.

    Shielded: half a switch is no state to leave a cell in, so a caller that leaves does not stop it.

    Raises:
      UnavailableError: the engine stopped before.
      NitsumError: the change failed.
    """
    waiting = asyncio.wrap_future(future)
    waiting.add_done_callback(_look_at)
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        if future.cancelled():
            raise UnavailableError("the server is stopping: the layout was not changed") from None
        raise


def _look_at(future: "asyncio.Future[Any]") -> None:
    """Takes note of an error whose caller has left, which asyncio would otherwise complain about."""
    if not future.cancelled():
        future.exception()
