"""What a cell and a front door say to each other."""

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from nitsum_jax.control.routing.report import CellReport
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.request import Request, RequestLimits, TokenDelta
from nitsum_jax.errors import NitsumError, UnavailableError

if TYPE_CHECKING:
    from nitsum_jax.engine.batching.load import InstanceLoad
    from nitsum_jax.engine.engine import EngineStats
    from nitsum_jax.engine.executables.progress import CompileProgress
    from nitsum_jax.engine.switching.switch import SwitchReport
    from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote

FAILED = "nitsum-cell cannot start: "
"""Stands before the line that says why, in what Ray passes on of a cell's process."""


@dataclasses.dataclass(frozen=True, slots=True)
class CellFacts:
    """What does not change about a cell.

    Attributes:
      version: of this package there.
      model: name of its model.
      tiers: of its scheduler, with targets in force.
      device_names: one per device.
      memory_report: for people.
      allowed_layouts: allow-list, empty: all.
      granule: tokens in whose multiples it shares prefixes; None: it shares none.
    """

    version: str
    model: str
    tiers: TierSet
    device_names: tuple[str, ...]
    memory_report: str
    allowed_layouts: tuple[str, ...]
    granule: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class CellStatus:
    """A cell now.

    Attributes:
      report: for the router.
      limits: of requests, at the layout in force.
      stats: counters and gauges.
      layout: in force, text form.
      ready_layouts: compiled ones.
      loads: of its instances.
      compiling: what is being compiled.
      lost_devices: indices.
      lately: by tier, how many of the last minute's requests ended there, and how many of these met both targets.
      decisions: of its planner, the last ones, oldest first.
      switches: that these came to, likewise.
    """

    report: CellReport
    limits: RequestLimits
    stats: "EngineStats"
    layout: str
    ready_layouts: tuple[str, ...]
    loads: "tuple[InstanceLoad, ...]"
    compiling: "CompileProgress"
    lost_devices: tuple[int, ...] = ()
    lately: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    decisions: "tuple[LayoutChoice, ...]" = ()
    switches: "tuple[SwitchNote, ...]" = ()


@dataclasses.dataclass(frozen=True, slots=True)
class CellEvents:
    """What happened in a cell since the last message.

    Attributes:
      deltas: of requests that this front door has sent.
      admitted: ids of those that an instance has taken.
      status: if it is time for one.
    """

    deltas: tuple[TokenDelta, ...] = ()
    admitted: tuple[str, ...] = ()
    status: CellStatus | None = None


class CellGoneError(UnavailableError):
    """The process of a cell has ended, or cannot be reached."""


class CellLeavesError(CellGoneError):
    """A cell is taken away, and says so: nothing is wrong with it or with its requests."""


class CellCalls(Protocol):
    """How a front door calls one cell; everything raises CellGoneError once it is gone."""

    # ruff: noqa: D102
    async def facts(self) -> CellFacts: ...
    def events(self, door: str) -> AsyncIterator[CellEvents]: ...  # until closed; its requests end with it
    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None: ...
    async def cancel(self, ids: Sequence[str]) -> None: ...
    async def set_layout(self, layout: str, prepare: bool) -> "SwitchReport": ...
    async def set_device(self, device: int, lost: bool) -> None: ...
