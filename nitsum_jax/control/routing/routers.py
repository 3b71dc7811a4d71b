"""Routers: which of many cells takes a request.  The one of ours, and those that it is compared with.

Ours (`PredictedRouter`) sends a request where both of its targets are predicted to be met with the least harm to
others: of the cells where it meets its targets and slows nobody down below his, one where it leaves half of the
tightest target, or as much as possible; of several, the one with the fewest requests, as where no cell meets them. A
cell that holds the beginning of its prompt goes before, while no target suffers. If reports are old, it looks at two
cells drawn at random instead of all: several routers that see the same old reports would all choose the same cell.
Pure: time comes in, and the seed decides what is drawn.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nitsum_jax.control.routing.cells import KnownCell, RoutedRequest


class CellRouter(Protocol):
    """Chooses cells."""

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The cell for a request, of at least one."""


class RoundRobin:
    """One after the other."""

    def __init__(self, seed: int = 0):
        self._turns = itertools.count(seed)

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The next one."""
        return cells[next(self._turns) % len(cells)]


class LeastQueue:
    """The fewest requests."""

    def __init__(self, seed: int = 0):
        self._draw = random.Random(seed)

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The one with the fewest, of equals any."""
        return min(cells, key=lambda cell: (cell.queue, self._draw.random()))


class PowerOfTwo:
    """The fewest requests, of two drawn at random."""

    def __init__(self, seed: int = 0):
        self._draw = random.Random(seed)

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The better of two."""
        return min(self._draw.sample(cells, min(2, len(cells))), key=lambda cell: cell.queue)


class PrefixFirst:
    """Where most of the prompt's beginning is, whatever else goes on there; where none is, the fewest requests."""

    def __init__(self, seed: int = 0):
        self._draw = random.Random(seed)

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The one that holds most."""
        return min(cells, key=lambda cell: (-cell.held(request), cell.queue, self._draw.random()))


@dataclasses.dataclass(frozen=True, slots=True)
class PredictedConfig:
    """How the router of ours decides.

    Attributes:
      ttft_margin: share of the TTFT target that a prediction may use.
      tpot_margin: share of the tightest TPOT that a decode step may take.
      affinity: a cell goes first for the prefix that it holds if the request takes at most this share of every target.
      ample: cells where it takes at most this share of the tightest target are equally good.
      least_prefix: tokens; fewer are computed sooner than looked for.
      stale_s: reports older than this are old.
    """

    ttft_margin: float = 0.9
    tpot_margin: float = 0.92
    affinity: float = 0.6
    ample: float = 0.5
    least_prefix: int = 64
    stale_s: float = 0.5


class PredictedRouter:
    """See the module."""

    def __init__(self, seed: int = 0, config: PredictedConfig = PredictedConfig()):
        self._draw = random.Random(seed)
        self._config = config

    def choose(self, request: RoutedRequest, cells: Sequence[KnownCell], now_s: float) -> KnownCell:
        """The one with the least harm."""
        if len(cells) > 2 and max(cell.age_s(now_s) for cell in cells) > self._config.stale_s:
            cells = self._few(request, cells)
        return min(cells, key=lambda cell: (*self._harm(request, cell, now_s), cell.queue, self._draw.random()))

    def _few(self, request: RoutedRequest, cells: Sequence[KnownCell]) -> list[KnownCell]:
        """Two of them, and the one that holds most of the prompt's beginning."""
        holder = max(cells, key=lambda cell: cell.held(request))
        drawn = self._draw.sample(cells, 2)
        return drawn if holder in drawn or not holder.held(request) else [*drawn, holder]

    def _harm(self, request: RoutedRequest, cell: KnownCell, now_s: float) -> tuple[int, float]:
        """Class (0: for its prefix, 1: no target suffers, 2: another's does, 3: its own does) and share, less first."""
        config, report, tier = self._config, cell.report, request.tier
        if report is None:
            return 3, math.inf
        told = report.tier(tier.name)
        held = cell.held(request)
        own_s = report.rest_s(request.prompt_tokens, held)
        ttft_s = cell.wait_s(tier.name, now_s) + own_s * told.stretch
        tpot_s = told.tpot_s + cell.since * report.growth_s
        first, each = ttft_s * 1000 / tier.ttft_ms, tpot_s * 1000 / tier.tpot_ms
        room = cell.room() >= request.prompt_tokens + request.expected_output
        if first > config.ttft_margin or each > 1 or not room:
            return 3, 0.0
        share = max(first, each, tpot_s / told.tightest_s)
        if share > config.tpot_margin:
            return 2, share
        if held >= config.least_prefix and share <= config.affinity:
            return 0, own_s
        return 1, round(max(share, config.ample), 1)


ROUTERS: Mapping[str, Callable[[int], CellRouter]] = {
    "round_robin": RoundRobin,
    "least_queue": LeastQueue,
    "power_of_two": PowerOfTwo,
    "prefix": PrefixFirst,
    "ours": PredictedRouter,
}
"""By the names that flags give them; each is made with a seed."""
