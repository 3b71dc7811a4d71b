"""What the dashboard shows: the cell at one moment, as plain values."""

import dataclasses
import json
from typing import Protocol

from nitsum_jax.engine.executables.progress import CompileProgress
from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote


@dataclasses.dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance; as `nitsum_jax.engine.batching.load.InstanceLoad`."""

    devices: tuple[int, ...]
    tp: int
    role: str
    running: int
    kv_use: float


@dataclasses.dataclass(frozen=True, slots=True)
class TierView:
    """One tier over the last minute; times in seconds, None where there is nothing to tell."""

    name: str
    ttft_target: float
    tpot_target: float
    waiting: int
    running: int
    counted: int
    attainment: float | None
    goodput: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """The whole cell; counters since the start of the server.

    Attributes:
      prefix_share: share of the prompt tokens that the prefix cache had; None where none was asked for.
    """

    waiting: int
    running: int
    queue_capacity: int
    kv_use: float
    tokens: int
    steps: int
    switches: int
    compiles: int
    prefix_share: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CellBox:
    """One of several cells.

    Attributes:
      name: of the cell.
      state: "joining", "serving" or "silent".
      layout: in force, text form.
      devices: indices among those of all cells.
      waiting, running, kv_use, tokens: of this cell; as of `Totals`.
      tiers: by name, (attainment, goodput) of the last minute.
    """

    name: str
    state: str
    layout: str
    devices: tuple[int, ...]
    waiting: int
    running: int
    kv_use: float
    tokens: int
    tiers: dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True, slots=True)
class DashboardSnapshot:
    """The cell at one moment.

    Attributes:
      time_s: seconds since 1970.
      model: name.
      version: of this package.
      phase: "starting", "serving" or "draining".
      layout: in force, text form.
      devices: names, by index.
      instances: of the layout.
      tiers: in the order of their file.
      switches: the last ones, oldest first.
      decisions: likewise.
      totals: of the cell.
      compiling: what is being compiled, and the layouts that are waited for.
      cells: of a front door; empty of a server that is one cell.
    """

    time_s: float
    model: str
    version: str
    phase: str
    layout: str
    devices: tuple[str, ...]
    instances: tuple[InstanceView, ...]
    tiers: tuple[TierView, ...]
    switches: tuple[SwitchNote, ...]
    decisions: tuple[LayoutChoice, ...]
    totals: Totals
    compiling: CompileProgress = CompileProgress()
    cells: tuple[CellBox, ...] = ()

    def as_json(self) -> str:
        """One line of JSON with the fields as they are named here."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))


class StatusSource(Protocol):
    """Whatever can be looked at."""

    def snapshot(self) -> DashboardSnapshot:
        """The cell now; called on the event loop once a second, so it must be quick."""


def point(snapshot: DashboardSnapshot) -> dict[str, object]:
    """The part of a snapshot that is kept for the curves."""
    kept: dict[str, object] = {
        "t": round(snapshot.time_s, 3),
        "tokens": snapshot.totals.tokens,
        "tiers": {tier.name: (tier.attainment, round(tier.goodput, 4)) for tier in snapshot.tiers},
    }
    if snapshot.cells:
        kept["cells"] = {cell.name: {"tokens": cell.tokens, "tiers": cell.tiers} for cell in snapshot.cells}
    return kept
