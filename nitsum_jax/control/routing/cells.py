"""What a router knows of a cell: its latest report, and what was sent there since.

Reports are old when they are read.  What the router itself has sent since is no secret to it, so that it neither sends
everything to the cell that reported itself idle nor avoids one for work that has been done by now.  Pure.
"""

import collections
import dataclasses

from nitsum_jax.control.routing.report import CellReport
from nitsum_jax.control.tiers import Tier


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedRequest:
    """A request that looks for a cell.

    Attributes:
      tier: its targets.
      prompt_tokens: to be computed; for a stream that goes on elsewhere, with what it has said.
      expected_output: tokens that it is expected to make.
      prefixes: (tokens, key) of beginnings of its prompt, ascending, as cells report them.
    """

    tier: Tier
    prompt_tokens: int
    expected_output: float = 128.0
    prefixes: tuple[tuple[int, bytes], ...] = ()


@dataclasses.dataclass(slots=True)
class SentRequest:
    """What a request that was sent since the report is taken to add.

    Attributes:
      time_s: when it was sent.
      prefill_s: of its prompt, alone.
      tokens: of KV cache.
    """

    time_s: float
    prefill_s: float
    tokens: float


class KnownCell:
    """A cell as a router knows it.

    Attributes:
      name: of the cell.
      report: the latest; None before the first.
      open: requests that this router has sent there and that have not ended: known without any report.
    """

    def __init__(self, name: str, report: CellReport | None = None):
        """Knows a name, and perhaps a report."""
        self.name = name
        self.report = report
        self.open = 0
        self._others = 0 if report is None else report.waiting + report.running
        self._since: collections.deque[SentRequest] = collections.deque()

    def reported(self, report: CellReport) -> None:
        """A report has come: what was sent before it was made is in it."""
        self.report = report
        self._others = max(0, report.waiting + report.running - self.open)
        while self._since and self._since[0].time_s < report.time_s:
            self._since.popleft()

    def sent(self, request: RoutedRequest, now_s: float) -> None:
        """A request goes there now."""
        self.open += 1
        if self.report is not None:
            prefill_s = self.report.rest_s(request.prompt_tokens, self.held(request))
            self._since.append(SentRequest(now_s, prefill_s, request.prompt_tokens + request.expected_output))

    def ended(self) -> None:
        """A request that was sent there is there no more."""
        self.open -= 1

    @property
    def since(self) -> int:
        """Requests that were sent after the report was made."""
        return len(self._since)

    @property
    def queue(self) -> int:
        """Requests that it has: those of this router, and those of others as of the report."""
        return self.open + self._others

    def age_s(self, now_s: float) -> float:
        """Age of the report."""
        return float("inf") if self.report is None else now_s - self.report.time_s

    def held(self, request: RoutedRequest) -> int:
        """Tokens of a prompt that it holds."""
        if self.report is None:
            return 0
        held = self.report.prefixes
        return next((tokens for tokens, key in reversed(request.prefixes) if key in held), 0)

    def wait_s(self, tier: str, now_s: float) -> float:
        """Seconds until a prompt would begin: what was reported and sent since, less what was worked off meanwhile."""
        if self.report is None:
            return 0.0
        told = self.report.tier(tier)
        left_s, time_s = told.wait_s, self.report.time_s
        for one in self._since:
            left_s = max(0.0, left_s - (one.time_s - time_s)) + one.prefill_s * told.stretch
            time_s = one.time_s
        return max(0.0, left_s - (now_s - time_s))

    def room(self) -> float:
        """Tokens of KV cache that are free, if what was sent since has them."""
        return (0 if self.report is None else self.report.free_tokens) - sum(one.tokens for one in self._since)
