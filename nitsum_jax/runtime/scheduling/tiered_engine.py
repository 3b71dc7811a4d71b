"""An engine whose layouts say which tiers their instances are kept for.

The engine itself knows devices and roles.  Whom an instance is kept for is the scheduling's business.  So a layout such
as `tp4/chat+tp1x4/code,batch` is taken apart here, and put together again when somebody asks for the layout in force.
Whoever changes layouts does it through this: administrators, notebooks, the planner.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol, cast

from nitsum_jax.engine.engine import Engine
from nitsum_jax.engine.switching.switch import SwitchReport
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout, parse_layout


class KeepsInstances(Protocol):
    """The part of the scheduling that is used here; see `scheduling.TieredScheduling`."""

    # ruff: noqa: D102
    def keep_for(self, plan: Layout) -> None: ...


class _TieredEngine:
    """An Engine; what is not written here is that of the engine behind it."""

    def __init__(self, engine: Engine, scheduling: KeepsInstances, kept: Layout) -> None:
        self._engine = engine
        self._scheduling = scheduling
        self._kept = kept  # what was asked for last: instances that are there, or that a switch will bring
        self._lock = threading.Lock()
        self._last: concurrent.futures.Future[SwitchReport] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def set_layout(self, layout: str | Layout) -> "concurrent.futures.Future[SwitchReport]":
        """As the engine's; where the instances stay and only their tiers change, nothing stops.

        Raises:
          NitsumError: a tier is not known, or what the engine raises; the tiers of the old layout stay in force.
        """
        wanted = self._read(layout)
        bare = wanted.without_tiers()
        with self._lock:
            before, there = self._kept, self.layout()
            self._keep(wanted)
            idle = self._last is None or self._last.done()
            if idle and set(bare.instances) == set(self._engine.layout().instances):
                future: concurrent.futures.Future[SwitchReport] = concurrent.futures.Future()
                future.set_result(SwitchReport(str(there), str(wanted), 0, 0, 0, 0.0, 0))
                return future
            try:
                future = self._last = self._engine.set_layout(bare)
            except BaseException:
                self._keep(before)
                raise
        future.add_done_callback(lambda done: self._failed(before, done))
        return future

    def prepare_layout(self, layout: str | Layout) -> "concurrent.futures.Future[SwitchReport]":
        """As the engine's; tiers make no difference.

        Raises:
          NitsumError: a tier is not known, or what the engine raises.
        """
        return self._engine.prepare_layout(self._read(layout).without_tiers())

    def layout(self) -> Layout:
        """The layout in force, with the tiers that its instances are kept for."""
        kept = {instance.group: instance.tiers for instance in self._kept.instances}
        return Layout(
            tuple(
                dataclasses.replace(instance, tiers=kept.get(instance.group, ()))
                for instance in self._engine.layout().instances
            )
        )

    def _read(self, layout: str | Layout) -> Layout:
        if isinstance(layout, str):
            layout = parse_layout(layout, len(self._engine.device_names))
        check_tiers(layout, self._engine.tier_names)
        return layout

    def _failed(self, before: Layout, done: "concurrent.futures.Future[SwitchReport]") -> None:
        if done is self._last and (done.cancelled() or done.exception() is not None):
            self._keep(before)

    def _keep(self, plan: Layout) -> None:
        """Has the scheduling keep the instances of a plan for its tiers, on the engine's thread."""
        self._kept = plan
        self._engine.ask(lambda: self._scheduling.keep_for(plan))


def tiered(engine: Engine, scheduling: KeepsInstances, kept: Layout) -> Engine:
    """The engine with layouts that may name tiers; `kept`: what the scheduling keeps its first instances for."""
    return cast(Engine, _TieredEngine(engine, scheduling, kept))


def check_tiers(layout: Layout, known: Sequence[str]) -> None:
    """Raises InvalidInputError if a layout names a tier that is not among these."""
    for tier in layout.tiers:
        if tier not in known:
            raise InvalidInputError(f"layout {layout} names the tier {tier!r}: give one of {', '.join(known)}")
