"""What was decided about the layout, and what the switches did: the last ones, for people and for metrics."""

import concurrent.futures
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from nitsum_jax.errors import one_line

KEPT = 50
"""Entries of each kind that are remembered."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutChoice:
    """A choice of layout.

    Attributes:
      time_s: when, seconds since 1970.
      choice: the layout chosen, in text form.
      reason: why, one line.
      plan_s: how long planning took; None where nothing was planned.
      cell: in which of several cells; empty: in the only one, or in all.
    """

    time_s: float
    choice: str
    reason: str
    plan_s: float | None = None
    cell: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class SwitchNote:
    """A switch that ended.

    Attributes:
      time_s: when, seconds since 1970.
      from_layout: text form; empty if it failed.
      to_layout: what was asked for.
      stall_s: time in which affected sequences produced no token.
      sequences: that moved.
      kv_bytes: between devices.
      weight_bytes: likewise.
      requeued: sequences to be computed anew.
      error: why it failed; None if it did not.
      cell: in which of several cells; empty: in the only one, or in all.
    """

    time_s: float
    from_layout: str
    to_layout: str
    stall_s: float = 0.0
    sequences: int = 0
    kv_bytes: int = 0
    weight_bytes: int = 0
    requeued: int = 0
    error: str | None = None
    cell: str = ""


class LayoutObserver(Protocol):
    """Is notified of entries as they are made, on the thread that makes them."""

    def decided(self, decision: LayoutChoice) -> None:
        """A layout was chosen."""

    def switched(self, note: SwitchNote) -> None:
        """A switch ended."""


class LayoutLog:
    """The last decisions and switches; thread-safe."""

    def __init__(self, observer: LayoutObserver | None = None, clock: Callable[[], float] = time.time) -> None:
        """Begins empty.

        Args:
          observer: is notified of every entry.
          clock: seconds since 1970.
        """
        self._observer = observer
        self._clock = clock
        self._lock = threading.Lock()
        self._decisions: deque[LayoutChoice] = deque(maxlen=KEPT)
        self._switches: deque[SwitchNote] = deque(maxlen=KEPT)

    def decide(self, choice: str, reason: str, plan_s: float | None = None) -> None:
        """Records that a layout was chosen; called for every change of the layout, and for the choice to stay."""
        decision = LayoutChoice(self._clock(), choice, one_line(reason), plan_s)
        with self._lock:
            self._decisions.append(decision)
        if self._observer is not None:
            self._observer.decided(decision)

    def watch(self, target: str, future: "concurrent.futures.Future[Any]") -> None:
        """Notes what a switch did when its future, of a SwitchReport, is done."""
        future.add_done_callback(lambda done: self._note(target, done))

    def decisions(self) -> tuple[LayoutChoice, ...]:
        """The last ones, oldest first."""
        with self._lock:
            return tuple(self._decisions)

    def switches(self) -> tuple[SwitchNote, ...]:
        """The last ones, oldest first."""
        with self._lock:
            return tuple(self._switches)

    def _note(self, target: str, done: "concurrent.futures.Future[Any]") -> None:
        now = self._clock()
        if done.cancelled():
            note = SwitchNote(now, "", target, error="the server stopped")
        elif (error := done.exception()) is not None:
            note = SwitchNote(now, "", target, error=one_line(str(error)))
        else:
            report = done.result()
            note = SwitchNote(
                now,
                report.from_layout,
                report.to_layout,
                stall_s=report.stall_ms / 1e3,
                sequences=report.sequences,
                kv_bytes=report.kv_bytes_moved,
                weight_bytes=report.weight_bytes_moved,
                requeued=report.requeued,
            )
        with self._lock:
            self._switches.append(note)
        if self._observer is not None:
            self._observer.switched(note)
