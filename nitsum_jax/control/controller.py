"""What decides on the cell's plan while it runs, and what it sees and says."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nitsum_jax.control.backlog import Backlog
from nitsum_jax.control.job import Job
from nitsum_jax.control.plan import CellPlan
from nitsum_jax.control.worker import Worker


@dataclasses.dataclass(frozen=True)
class CellView:
    """The cell as a controller sees it.

    Attributes:
      plan: in force.
      workers: its instances.
      backlog: requests that no instance has taken.
      num_devices: devices of the cell.
      lost: devices that cannot be used.
    """

    plan: CellPlan
    workers: Sequence[Worker]
    backlog: Backlog
    num_devices: int
    lost: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan that was considered: its text, and the goodput expected of it, requests per second."""

    plan: str
    goodput: float


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a controller decided, with all that it was based on, so that it can be checked later.

    Attributes:
      time_s: when.
      inputs: what it knew, as JSON has it.
      candidates: what it considered.
      choice: the plan it wants.
      switch: whether to switch to it now.
      reason: in words.
    """

    time_s: float
    inputs: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    choice: CellPlan
    switch: bool
    reason: str


class Controller(Protocol):
    """Adaptive control, and the dynamic baselines.

    Attributes:
      interval_s: time between ticks.
    """

    interval_s: float

    # ruff: noqa: D102
    def arrived(self, now_s: float, tier: str, prompt_tokens: int) -> None: ...
    def finished(self, now_s: float, job: Job) -> None: ...
    def tick(self, now_s: float, view: CellView) -> Decision | None: ...
