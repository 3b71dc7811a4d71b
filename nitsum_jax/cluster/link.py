"""A front door's connection to one cell: its facts, its messages, and how long it has been silent."""

import asyncio
import dataclasses
import enum
import logging
import time
from collections.abc import Callable

import nitsum_jax
from nitsum_jax.cluster.messages import CellCalls, CellEvents, CellFacts, CellGoneError, CellLeavesError, CellStatus
from nitsum_jax.control.routing.cells import KnownCell
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import UnavailableError, one_line

_LOG = logging.getLogger(__name__)


class LinkState(enum.Enum):
    """What a cell is good for."""

    JOINING = "joining"
    SERVING = "serving"
    SILENT = "silent"  # hung, or its machine is unreachable: it gets nothing, and may come back
    GONE = "gone"


class CellLink:
    """One cell, on the event loop of the front door's engine."""

    def __init__(
        self,
        name: str,
        calls: CellCalls,
        *,
        on_events: Callable[["CellLink", CellEvents], None],
        on_gone: Callable[["CellLink", str, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Knows nothing of the cell yet; see `run`.

        Args:
          name: of the cell.
          calls: reach it.
          on_events: takes its messages.
          on_gone: told once when it is gone, why, and whether it left by itself.
          clock: monotonic seconds.
        """
        self.name = name
        self.calls = calls
        self.known = KnownCell(name)
        self.state = LinkState.JOINING
        self.facts: CellFacts | None = None
        self.status: CellStatus | None = None
        self.heard_s = clock()
        self.task: asyncio.Task[None] | None = None
        self._on_events = on_events
        self._on_gone = on_gone
        self._clock = clock

    async def run(self, door: str, expected: "Callable[[], tuple[str, TierSet | None]]", join_s: float) -> None:
        """Joins the cell and hears it until it is gone.

        Args:
          door: name of this front door.
          expected: model and tiers that a cell must have; no tiers: any.
          join_s: most seconds until it tells its facts.
        """
        why, left = "it has ended", False
        try:
            async with asyncio.timeout(join_s):  # wait_for of Python 3.11 can lose that the task is cancelled
                self.facts = await self.calls.facts()
            check_facts(self.name, self.facts, *expected())
            async for events in self.calls.events(door):
                self.heard_s = self._clock()
                if events.status is not None:
                    self._heard(events.status)
                self._on_events(self, events)
        except CellGoneError as error:
            why, left = one_line(str(error), 120), isinstance(error, CellLeavesError)
        except TimeoutError:
            why = f"it told nothing within {join_s:g} s"
        except UnavailableError as error:
            why = str(error)
            _LOG.error("%s", why)
        finally:
            if self.state is not LinkState.GONE:
                self.state = LinkState.GONE
                self._on_gone(self, why, left)

    def _heard(self, status: CellStatus) -> None:
        self.status = status
        self.known.reported(dataclasses.replace(status.report, time_s=self.heard_s))
        if self.state is not LinkState.SERVING:
            _LOG.info("cell %s serves, layout %s", self.name, status.layout)
            self.state = LinkState.SERVING

    def silent_s(self) -> float:
        """Seconds since it was heard."""
        return self._clock() - self.heard_s


def check_facts(name: str, facts: CellFacts, model: str, tiers: TierSet | None) -> None:
    """Raises UnavailableError if a cell does not fit the front door: the line says in what they differ."""
    if facts.version != nitsum_jax.__version__:
        raise UnavailableError(
            f"cell {name} has version {facts.version} and the front door {nitsum_jax.__version__}: install one version"
        )
    if facts.model != model:
        raise UnavailableError(f"cell {name} serves {facts.model}, not {model}: give both the same --model")
    if tiers is not None and facts.tiers != tiers:
        raise UnavailableError(
            f"cell {name} has other tiers ({', '.join(facts.tiers.names)}) or targets: give all the same --tiers file"
        )
