"""How far compiling is: for somebody who waits for a layout, and for those whose streams run beside it."""

import dataclasses
import enum
import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from nitsum_jax.meshes.layout import Layout

if TYPE_CHECKING:  # servers and tests that have no model need not load JAX for this
    from nitsum_jax.engine.step.packing import StepShape

Group = tuple[int, ...]
Key = tuple[Group, "StepShape"]


class Activity(enum.StrEnum):
    """What a compiling thread does with an executable."""

    COMPILING = "compiling"
    LOADING = "loading"  # what was compiled for other devices, or is kept on disk
    TRYING = "trying"  # its first run


class Stage(enum.StrEnum):
    """What somebody who asked for a layout waits for."""

    COMPILING = "compiling"
    SWITCHING = "switching"  # weights, steps in flight, copies


@dataclasses.dataclass(frozen=True, slots=True)
class Making:
    """An executable that is being made.

    Attributes:
      activity: what is done with it.
      tp: devices that run it.
      phase: "prefill", "decode" or "mixed".
      size: of its bucket: prompt tokens, or rows of a batch.
      seconds: for how long.
    """

    activity: str
    tp: int
    phase: str
    size: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class LayoutProgress:
    """A layout that somebody waits for.

    Attributes:
      layout: text form.
      stage: what is waited for.
      needed: executables without which its instances cannot serve, one per bucket and group of devices.
      compiled: of these, how many are compiled or loaded.
      ready: of these, how many were tried too, where that is done.
      seconds: since it was asked for.
    """

    layout: str
    stage: str
    needed: int
    compiled: int
    ready: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class CompileProgress:
    """What is compiled now.

    Attributes:
      making: by the compiling threads.
      queued: executables that are yet to be compiled, those included that nobody waits for.
      layouts: that somebody waits for, in the order in which they were asked for.
    """

    making: tuple[Making, ...] = ()
    queued: int = 0
    layouts: tuple[LayoutProgress, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class WantedLayout:
    """A layout that was asked for: the groups of its instances, and when (`time.monotonic`)."""

    layout: Layout
    groups: tuple[Group, ...]
    since_s: float


class Worksheet:
    """What is being made and what is made, as the compiling threads note it; not thread-safe by itself."""

    def __init__(self) -> None:
        self._making: dict[Key, tuple[Activity, float]] = {}
        self._compiled: set[Key] = set()

    def begin(self, key: Key, activity: Activity) -> None:
        """Work on an executable begins, or goes on with something else."""
        self._making[key] = activity, time.monotonic()

    def end(self, key: Key, *, compiled: bool) -> None:
        """Work on it ends for now."""
        self._making.pop(key, None)
        if compiled:
            self._compiled.add(key)

    def making(self) -> tuple[Making, ...]:
        """What is worked on, the longest first."""
        now = time.monotonic()
        return tuple(
            Making(
                str(activity),
                len(group),
                "decode" if shape.is_decode else "mixed" if shape.is_mixed else "prefill",
                shape.batch if shape.is_decode else shape.tokens,
                now - since_s,
            )
            for (group, shape), (activity, since_s) in sorted(self._making.items(), key=lambda item: item[1][1])
        )

    def compiled(self, keys: Iterable[Key]) -> int:
        """How many of these are compiled."""
        return sum(key in self._compiled for key in keys)


def layout_progress(
    wanted: WantedLayout, essential: Collection["StepShape"], sheet: Worksheet, ready: Collection[Key], now_s: float
) -> LayoutProgress:
    """How far a layout is."""
    keys = {(group, shape) for group in wanted.groups for shape in essential}
    done = sum(key in ready for key in keys)
    stage = Stage.SWITCHING if done == len(keys) else Stage.COMPILING
    compiled = max(done, sheet.compiled(keys))
    return LayoutProgress(str(wanted.layout), str(stage), len(keys), compiled, done, now_s - wanted.since_s)


def distinct(wanted: Sequence[WantedLayout]) -> tuple[WantedLayout, ...]:
    """Each layout once, with the time of its first mention."""
    first: dict[Layout, WantedLayout] = {}
    for one in wanted:
        there = first.get(one.layout)
        if there is None or one.since_s < there.since_s:
            first[one.layout] = one
    return tuple(sorted(first.values(), key=lambda one: one.since_s))
