"""What a cell tells about itself a few times a second, for a router over many cells.

Made with the predictions of the cell's own scheduler.  Pure.
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from nitsum_jax.control.scheduling.forecast import USUAL_PROMPT, TierForecast, forecast
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.scheduling.worker import Worker

GRID = (64, 256, 1024, 4096, 16384)
"""Tokens of prompts whose time a report tells."""
_MORE = 8  # requests, over which the growth of a step is measured


@dataclasses.dataclass(frozen=True, slots=True)
class CellReport:
    """A cell at one moment.

    Attributes:
      cell: its name.
      time_s: when it was made, on the clock of whoever reads it.
      tiers: what a usual request of each tier would get.
      prefill_s: of a prompt of each length in GRID, alone in the fastest instance that takes prompts.
      growth_s: by how much one more request makes a decode step longer.
      waiting: requests that no instance has taken.
      running: requests that an instance works on.
      free_tokens: room in the KV cache.
      page_size: tokens in whose multiples prefixes are shared.
      prefixes: keys of beginnings of prompts that it holds.
    """

    cell: str
    time_s: float
    tiers: tuple[TierForecast, ...]
    prefill_s: tuple[float, ...]
    growth_s: float
    waiting: int
    running: int
    free_tokens: int
    page_size: int = 1
    prefixes: frozenset[bytes] = frozenset()

    def tier(self, name: str) -> TierForecast:
        """That of a tier; infinite times of one that the cell does not know."""
        return next((one for one in self.tiers if one.tier == name), TierForecast(name, math.inf, math.inf))

    def alone_s(self, tokens: int) -> float:
        """Seconds of a prefill of so many tokens, on a line between those of the grid."""
        if tokens <= 0:
            return 0.0
        right = min(max(1, bisect.bisect_left(GRID, tokens)), len(GRID) - 1)
        (x0, x1), (y0, y1) = GRID[right - 1 : right + 1], self.prefill_s[right - 1 : right + 1]
        return max(0.0, y0 + (tokens - x0) * (y1 - y0) / (x1 - x0))

    def rest_s(self, tokens: int, held: int) -> float:
        """Seconds of a prefill whose first `held` tokens are there; what follows attends to them all the same."""
        held = min(held, tokens - 1)
        return max(self.alone_s(tokens) - self.alone_s(held), self.alone_s(tokens - held))

    def scaled(self, scale: float) -> "CellReport":
        """With this many seconds for each of its own; its time stays."""
        return dataclasses.replace(
            self,
            tiers=tuple(one.scaled(scale) for one in self.tiers),
            prefill_s=tuple(seconds * scale for seconds in self.prefill_s),
            growth_s=self.growth_s * scale,
        )


def make_report(
    cell: str,
    scheduler: Scheduler,
    workers: Sequence[Worker],
    now_s: float,
    *,
    prefixes: frozenset[bytes] = frozenset(),
) -> CellReport:
    """Reports a cell as it is now; on the thread that runs it.

    Args:
      cell: its name.
      scheduler: of the cell.
      workers: its instances.
      now_s: the time, on the clock of its jobs.
      prefixes: keys of what it holds.
    """
    takers = [worker for worker in workers if worker.serves_prompts]
    tps = {worker.tp for worker in takers}
    grid = tuple(min((scheduler.predict.prefill_s(tp, tokens) for tp in tps), default=math.inf) for tokens in GRID)
    return CellReport(
        cell,
        now_s,
        tuple(forecast(scheduler, workers, tier, now_s) for tier in scheduler.tiers),
        grid,
        min((_growth_s(scheduler, worker) for worker in workers if worker.takes_decodes), default=0.0),
        len(scheduler.backlog),
        sum(worker.jobs for worker in workers),
        sum(worker.free_blocks * worker.page_size for worker in workers),
        workers[0].page_size if workers else 1,
        prefixes,
    )


def _growth_s(scheduler: Scheduler, worker: Worker) -> float:
    count, context = len(worker.decoding) + 1, worker.context + USUAL_PROMPT
    more = scheduler.cost.step_s(worker.tp, count + _MORE, context + _MORE * USUAL_PROMPT)
    return max(0.0, more - scheduler.cost.step_s(worker.tp, count, context)) / _MORE
