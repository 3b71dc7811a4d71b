"""What happened lately, per tier: attainment, goodput and percentiles over a sliding window."""

import dataclasses
import math
from collections import deque
from collections.abc import Sequence

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.runtime.records import ServedRequest

WINDOW_S = 60.0
MOST = 4096
"""Requests per tier that are remembered; under heavier load the window is shorter than WINDOW_S."""


@dataclasses.dataclass(frozen=True, slots=True)
class TierWindow:
    """A tier over the window; percentiles are seconds, None where there is nothing to take them of.

    Attributes:
      counted: requests that count for the targets.
      attainment: the share of them that met both; None if there were none.
      goodput: requests per second that met both.
      ttft_p50: median time to first token; likewise the others.
    """

    counted: int
    attainment: float | None
    goodput: float
    ttft_p50: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    tpot_p99: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Seen:
    time_s: float
    met: bool | None
    ttft_s: float | None
    tpot_s: float | None


class Windows:
    """A window per tier. Only the event loop touches it."""

    def __init__(self, tiers: TierSet, window_s: float = WINDOW_S) -> None:
        """Begins empty.

        Args:
          tiers: those that are watched.
          window_s: length of the window, seconds.
        """
        self._tiers = tiers
        self._window_s = window_s
        self._seen: dict[str, deque[_Seen]] = {name: deque(maxlen=MOST) for name in tiers.names}

    def add(self, record: ServedRequest) -> None:
        """Notes a request that ended."""
        if record.tier in self._seen and record.ended_s is not None:
            met = record.met(self._tiers.get(record.tier))
            self._seen[record.tier].append(_Seen(record.ended_s, met, record.ttft_s, record.tpot_s))

    def of(self, tier: str, now_s: float) -> TierWindow:
        """The window of one tier that ends now; times on the clock of the records."""
        seen = self._seen[tier]
        span_s = self._window_s
        if len(seen) == MOST:
            span_s = min(span_s, max(now_s - seen[0].time_s, 1e-3))
        # A request is noted when its handler ends, which may be out of order by the slowness of its reader.
        recent = [entry for entry in seen if now_s - entry.time_s <= self._window_s]
        while seen and now_s - seen[0].time_s > self._window_s:
            seen.popleft()
        counted = [entry.met for entry in recent if entry.met is not None]
        ttfts = sorted(entry.ttft_s for entry in recent if entry.ttft_s is not None)
        tpots = sorted(entry.tpot_s for entry in recent if entry.tpot_s is not None)
        return TierWindow(
            counted=len(counted),
            attainment=sum(counted) / len(counted) if counted else None,
            goodput=sum(counted) / span_s,
            ttft_p50=percentile(ttfts, 0.5),
            ttft_p99=percentile(ttfts, 0.99),
            tpot_p50=percentile(tpots, 0.5),
            tpot_p99=percentile(tpots, 0.99),
        )


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the ascending values do not exceed; None of none."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
