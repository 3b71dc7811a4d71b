"""The engine as the front ends see it: it knows the caller, and records what the caller changes."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, cast

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.request import Request
from nitsum_jax.runtime.backend import ServingEngine
from nitsum_jax.runtime.callers import current_caller
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.server.security.errors import DeniedError


class _AccessCheckedEngine:
    """A ServingEngine; what is not written here is that of the engine behind it."""

    def __init__(
        self, engine: ServingEngine, layout_log: LayoutLog, stopped: Callable[[str], None], tiers: TierSet
    ) -> None:
        self._engine = engine
        self._tiers = tiers
        self._layout_log = layout_log
        self._stopped = stopped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit(self, request: Request) -> None:
        """As the engine's, for the tiers that the caller may use.

        Raises:
          DeniedError: its key does not name the tier, or the request names tighter targets than those of the tier.
          NitsumError: what the engine raises.
        """
        caller = current_caller()
        if caller.tiers is not None and request.tier not in caller.tiers:
            raise DeniedError(
                f"the API key {caller.client!r} may not use the tier {request.tier!r}: "
                f"ask for {' or '.join(caller.tiers) or 'another key'}"
            )
        if caller.tiers is not None and self._tighter(request):
            raise DeniedError(
                f"the API key {caller.client!r} is for certain tiers, so its requests may not name tighter targets "
                f"than those of the tier {request.tier!r}: leave ttft_ms and tpot_ms out, or ask for another key"
            )
        self._engine.submit(request)

    def _tighter(self, request: Request) -> bool:
        if request.tier not in self._tiers:  # the engine says so
            return False
        tier = self._tiers.get(request.tier)
        own = tier.with_targets(request.ttft_ms, request.tpot_ms)
        return own.ttft_ms < tier.ttft_ms or own.tpot_ms < tier.tpot_ms

    def cancel(self, request_id: str) -> None:
        """As the engine's. A front end that cancels a request which it still reads has all it wants: no abort."""
        self._stopped(request_id)
        self._engine.cancel(request_id)

    def set_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        """As the engine's, for administrators; noted in the layout log.

        Raises:
          DeniedError: the caller is none.
          NitsumError: what the engine raises.
        """
        who = _administrator()
        future = self._engine.set_layout(layout)
        self._layout_log.decide(layout, f"asked for by {who}")
        self._layout_log.watch(layout, future)
        return future

    def prepare_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        """As the engine's, for administrators: compiling takes time that others may need.

        Raises:
          DeniedError: the caller is none.
          NitsumError: what the engine raises.
        """
        _administrator()
        return self._engine.prepare_layout(layout)

    def lose_device(self, device: int) -> None:
        """As the engine's, for administrators.

        Raises:
          DeniedError: the caller is none.
          NitsumError: what the engine raises.
        """
        _administrator()
        self._engine.lose_device(device)

    def restore_device(self, device: int) -> None:
        """As the engine's, for administrators.

        Raises:
          DeniedError, NitsumError: as `lose_device`.
        """
        _administrator()
        self._engine.restore_device(device)


def access_checked(
    engine: ServingEngine, layout_log: LayoutLog, stopped: Callable[[str], None], tiers: TierSet
) -> ServingEngine:
    """The engine for front ends. The controller, which decides for itself, uses the engine as it is.

    Args:
      engine: behind it.
      layout_log: gets what administrators change.
      stopped: called with the id of every request that is cancelled (`StreamRouter.stopped`).
      tiers: of the server.
    """
    return cast(ServingEngine, _AccessCheckedEngine(engine, layout_log, stopped, tiers))


def _administrator() -> str:
    caller = current_caller()
    if not caller.admin:
        raise DeniedError("only an administrator may change the cell: use an admin key, or the admin port")
    return f"the key {caller.client!r}" if caller.client else "an administrator"
