"""Workloads: requests with their arrival times, and the operations that make new workloads of old ones.

All operations are pure; what draws random numbers takes a seed, and the same seed gives the same bits.
"""

import dataclasses
import heapq
import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from nitsum_jax.errors import InvalidInputError

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
      arrival_s: seconds after the start of the workload.
      prompt_tokens: length of the prompt, at least 1.
      output_tokens: tokens that will be generated, at least 1.
      tier: name of its latency tier.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tier: str


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival.

    Attributes:
      requests: sorted by arrival; all arrivals lie in [0, seconds].
      name: what tables and reports call it.
      seconds: how long it lasts, above 0.  Silence before the first and after the last request is part of it.

    Raises:
      ValueError: seconds is not above 0, arrivals are not sorted or not in [0, seconds], or a length is below 1.
    """

    requests: tuple[TraceRequest, ...]
    name: str
    seconds: float

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ValueError(f"workload {self.name!r}: seconds={self.seconds} must be a number above 0")
        last = 0.0
        for i, r in enumerate(self.requests):
            if not last <= r.arrival_s <= self.seconds:
                raise ValueError(
                    f"workload {self.name!r}: request {i} arrives at {r.arrival_s} s: arrivals must be sorted and"
                    f" lie in 0 to {self.seconds} s"
                )
            if r.prompt_tokens < 1 or r.output_tokens < 1:
                raise ValueError(f"workload {self.name!r}: request {i} has no prompt or no output: {r}")
            last = r.arrival_s

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def rate(self) -> float:
        """Mean requests per second."""
        return len(self.requests) / self.seconds

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers that occur, sorted."""
        return tuple(sorted({r.tier for r in self.requests}))

    def arrivals(self) -> npt.NDArray[np.float64]:
        """Arrival times, `[requests]`, seconds."""
        return np.fromiter((r.arrival_s for r in self.requests), np.float64, len(self.requests))

    def only(self, tier: str) -> "Workload":
        """The requests of one tier, over the same time."""
        return Workload(tuple(r for r in self.requests if r.tier == tier), f"{self.name}/{tier}", self.seconds)


def retier(workload: Workload, tier: str) -> Workload:
    """The same requests, all in one tier."""
    return Workload(
        tuple(TraceRequest(r.arrival_s, r.prompt_tokens, r.output_tokens, tier) for r in workload.requests),
        workload.name,
        workload.seconds,
    )


def mix(parts: Sequence[Workload], name: str | None = None) -> Workload:
    """All requests of several workloads that start together.

    Where arrivals coincide, the earlier part's request comes first.  The mix lasts as long as the longest part; cut it
    with `window` where the tail with fewer parts would mislead.

    Args:
      parts: at least one.
      name: of the mix; the parts' names joined by `+` if left out.

    Raises:
      ValueError: parts is empty.
    """
    if not parts:
        raise ValueError("mix: give at least one workload")
    merged = tuple(heapq.merge(*(p.requests for p in parts), key=_arrival))
    return Workload(merged, name or "+".join(p.name for p in parts), max(p.seconds for p in parts))


def window(workload: Workload, start_s: float, seconds: float) -> Workload:
    """The requests that arrive in [start_s, start_s + seconds), with arrivals counted from start_s.

    Args:
      workload: to cut.
      start_s: at least 0 and before the workload's end.
      seconds: above 0.  A window that reaches beyond the end is cut there.

    Raises:
      InvalidInputError: start_s or seconds is out of its range.
    """
    if not 0 <= start_s < workload.seconds or not seconds > 0:
        raise InvalidInputError(
            f"window of {seconds} s from {start_s} s: {workload.name} lasts {workload.seconds:.1f} s; start in it, and"
            " take more than 0 s"
        )
    end = start_s + seconds
    to_end = end >= workload.seconds
    return Workload(
        tuple(
            # Rounding of a difference may pass the end by an ulp.
            dataclasses.replace(r, arrival_s=min(r.arrival_s - start_s, seconds))
            for r in workload.requests
            if start_s <= r.arrival_s and (to_end or r.arrival_s < end)
        ),
        workload.name,
        workload.seconds - start_s if to_end else seconds,
    )


def concatenate(phases: Sequence[Workload], name: str | None = None) -> Workload:
    """One workload after the other, each for its whole length.

    Args:
      phases: at least one.
      name: the phases' names joined by ` > ` if left out.

    Raises:
      ValueError: phases is empty.
    """
    if not phases:
        raise ValueError("concatenate: give at least one workload")
    requests: list[TraceRequest] = []
    start = 0.0
    for phase in phases:
        requests += (dataclasses.replace(r, arrival_s=start + r.arrival_s) for r in phase.requests)
        start += phase.seconds
    return Workload(tuple(requests), name or " > ".join(p.name for p in phases), start)


def compress_time(workload: Workload, factor: float) -> Workload:
    """The same requests in 1/factor of the time.

    The order, the lengths and the shape of the rate curve stay as they are, and everything that moves moves `factor`
    times faster.  So counts in windows of w seconds are what they were in windows of factor * w; where bursts last
    longer than w, that is more dispersion than before.

    Args:
      workload: to compress.
      factor: of the rate, above 0; below 1 it stretches.

    Raises:
      InvalidInputError: factor is out of its range.
    """
    _check_factor(factor)
    seconds = workload.seconds / factor
    return Workload(
        tuple(dataclasses.replace(r, arrival_s=min(r.arrival_s / factor, seconds)) for r in workload.requests),
        workload.name,
        seconds,
    )


def scale_rate(
    workload: Workload, factor: float, seed: int = 0, *, shift_s: float = 120.0, window_s: float = 10.0
) -> Workload:
    """A workload of `factor` times the rate over the same time, as bursty as before.

    It models `factor` times as many users who behave like those of the trace.  Each is a copy of the workload,
    moved in time by up to shift_s (copy 0 stays where it is; what leaves at one end comes back at the other), and the
    last copy is thinned to the fraction that is left.  Hence

    - the index of dispersion (variance / mean of the counts) in windows shorter than shift_s stays what it was, for the
      copies are moved too far apart for their bursts to coincide;
    - what changes more slowly than shift_s, as a day curve or the phases of a test, keeps its shape: the rate at every
      time is multiplied;
    - lengths keep their neighbours: a copy is never reordered.  Thinning drops runs of requests that follow each other,
      not single ones, as dropping single ones makes a bursty stream smoother (dispersion I becomes 1 + p (I - 1)).  In
      runs of r it becomes p I + (1 - p) r over windows longer than a run; r is chosen as the I of window_s.

    With one seed the workloads nest: a lower factor's requests are a subset of a higher factor's, as a search for the
    highest rate that can be served wants it.  Factor 1 is the workload itself.

    Args:
      workload: to scale.
      factor: of the rate, above 0; kept to within one run of requests.
      seed: of the moves and of what is thinned, at least 0.
      shift_s: furthest that a copy is moved, seconds, at least 0; cut to a quarter of the workload.
      window_s: the window whose index of dispersion sets the length of the runs, seconds, above 0.

    Raises:
      InvalidInputError: factor is out of its range.
    """
    _check_factor(factor)
    if not shift_s >= 0 or not window_s > 0:
        raise ValueError(f"scale_rate: {shift_s=} must be at least 0 and {window_s=} above 0")
    reach = min(shift_s, workload.seconds / 4)
    run = _run_length(workload, window_s)
    copies = []
    for k in range(math.ceil(factor)):
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(k,))))
        offset = 0.0 if k == 0 else reach * _spread(k, float(random.uniform(-0.1, 0.1)))
        kept: Iterable[TraceRequest] = workload.requests
        if factor - k < 1:
            kept = _thinned(workload.requests, factor - k, run, random)
        copies.append(_moved(kept, offset, workload.seconds))
    return Workload(tuple(heapq.merge(*copies, key=_arrival)), workload.name, workload.seconds)


def index_of_dispersion(
    arrivals_s: npt.ArrayLike, seconds: float, window_s: float, *, within_s: float | None = None
) -> float:
    """Variance over mean of the number of arrivals in windows: 1 for a Poisson process, more for a bursty one.

    Args:
      arrivals_s: `[requests]`, seconds, in [0, seconds].
      seconds: length of the time looked at; what is left beyond the last whole window is left out.
      window_s: length of a window.
      within_s: compare windows only with those of the same stretch of this length, so that slow changes of the rate do
        not count; of all windows together if left out.

    Returns:
      The index; 1.0 where there are fewer than two windows or no arrivals.
    """
    counts = window_counts(arrivals_s, seconds, window_s)
    group = len(counts) if within_s is None else max(2, int(within_s / window_s))
    groups = [counts[i : i + group] for i in range(0, len(counts), group)]
    groups = [g for g in groups if len(g) >= 2]
    total = sum(float(g.mean()) * len(g) for g in groups)
    if total == 0:
        return 1.0
    return sum(float(g.var()) * len(g) for g in groups) / total


def window_counts(arrivals_s: npt.ArrayLike, seconds: float, window_s: float) -> npt.NDArray[np.int64]:
    """Arrivals in each whole window, `[seconds // window_s]`."""
    whole = int(seconds / window_s)
    bins = (np.asarray(arrivals_s, np.float64) / window_s).astype(np.int64)
    return np.bincount(bins[bins < whole], minlength=whole)


_arrival = operator.attrgetter("arrival_s")


def _check_factor(factor: float) -> None:
    if not (factor > 0 and math.isfinite(factor)):
        raise InvalidInputError(f"rate factor {factor}: give a number above 0")


def _run_length(workload: Workload, window_s: float) -> int:
    """Requests of one run to be dropped or kept together."""
    dispersion = index_of_dispersion(workload.arrivals(), workload.seconds, window_s, within_s=60 * window_s)
    return max(1, min(round(dispersion), len(workload) // 20))


def _spread(k: int, jitter: float) -> float:
    """A place in [-1, 1) for the k-th copy, k >= 1: multiples of the golden ratio keep clear of each other and of 0."""
    return (k * _GOLDEN + jitter / (2 * k) + 0.5) % 1.0 * 2 - 1


def _thinned(
    requests: Sequence[TraceRequest], fraction: float, run: int, random: np.random.Generator
) -> list[TraceRequest]:
    """The fraction of the runs that come first in a random order, which does not depend on the fraction."""
    count = -(-len(requests) // run)
    order = random.permutation(count)
    kept = np.sort(order[: round(fraction * count)])
    return [r for i in kept.tolist() for r in requests[i * run : (i + 1) * run]]


def _moved(requests: Iterable[TraceRequest], offset_s: float, seconds: float) -> list[TraceRequest]:
    """All arrivals moved by offset_s, round the end."""
    if offset_s == 0:
        return list(requests)
    moved = [dataclasses.replace(r, arrival_s=(r.arrival_s + offset_s) % seconds) for r in requests]
    moved.sort(key=_arrival)
    return moved
