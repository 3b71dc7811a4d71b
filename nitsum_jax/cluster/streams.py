"""The live streams of a front door: what is needed to go on with one elsewhere."""

import dataclasses
from typing import Any

from nitsum_jax.engine.request import Request, TokenDelta

MOST_CELLS = 2
"""Cells that may end under a request before it is taken for the cause."""


@dataclasses.dataclass(slots=True, eq=False)
class LiveStream:
    """A request that a front door has taken, wherever it runs.

    Attributes:
      request: as it came.
      generated: output tokens that came so far: with prompt, parameters and seed all that there is to know.
      attempt: how often it was sent to a cell; results of earlier attempts count for nothing.
      cell: where it is; None between two.
      refused: cells that did not take it, since it was last taken.
      admitted: an instance has taken it, once.
      looking_s: since when it has looked for a cell that takes it; None: one has it.
      lost: cells that ended or hung while they worked on it.
    """

    request: Request
    generated: list[int] = dataclasses.field(default_factory=list)
    attempt: int = 0
    cell: str | None = None
    refused: set[str] = dataclasses.field(default_factory=set)
    admitted: bool = False
    looking_s: float | None = None
    lost: int = 0

    @property
    def attempt_id(self) -> str:
        """What the cell knows it by."""
        return f"{self.request.id}#{self.attempt}"

    def sent(self, cell: str) -> Request:
        """It goes to a cell now: the request for it."""
        self.attempt += 1
        self.cell = cell
        # A compiled form stays in its process; the cell compiles what it was made of.
        form: Any = getattr(self.request.form, "spec", self.request.form)
        generated = tuple(self.generated)
        return dataclasses.replace(self.request, id=self.attempt_id, generated=generated, deadline_s=None, form=form)

    def take(self, delta: TokenDelta, now_s: float) -> TokenDelta:
        """Tokens came: as the front door passes them on, on its own clock."""
        self.generated += delta.token_ids
        return dataclasses.replace(delta, request_id=self.request.id, time_s=now_s)

    @property
    def poisonous(self) -> bool:
        """Whether too many cells have ended under it."""
        return self.lost >= MOST_CELLS


def origin(attempt_id: str) -> str:
    """The id of the request of an attempt."""
    return attempt_id.rpartition("#")[0]
