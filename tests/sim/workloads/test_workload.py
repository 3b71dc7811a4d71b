"""Mixing, windows, phases, and scaling that keeps what it says it keeps."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads.schedules import constant, steps
from nitsum_jax.sim.workloads.stand_ins import stand_in_stream
from nitsum_jax.sim.workloads.synthetic import LognormalLengths, Stream, generate
from nitsum_jax.sim.workloads.workload import (
    TraceRequest,
    Workload,
    compress_time,
    concatenate,
    index_of_dispersion,
    mix,
    retier,
    scale_rate,
    window,
    window_counts,
)

Counts = collections.Counter[tuple[int, int, str]]


@st.composite
def workloads(draw: st.DrawFn, tier: str = "t") -> Workload:
    arrivals = sorted(draw(st.lists(st.floats(0, 100), max_size=30)))
    lengths = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=30, max_size=30))
    requests = tuple(TraceRequest(a, p, o, tier) for a, (p, o) in zip(arrivals, lengths, strict=False))
    return Workload(requests, "w", draw(st.floats(100, 200)))


def bodies(workload: Workload) -> Counts:
    return collections.Counter((r.prompt_tokens, r.output_tokens, r.tier) for r in workload.requests)


def code_like(seconds: float = 3600, seed: int = 3) -> Workload:
    return generate([stand_in_stream("azure-code-like", "code")], seconds, seed)


@pytest.mark.parametrize(
    ("requests", "seconds"),
    [
        ((TraceRequest(2, 1, 1, "t"), TraceRequest(1, 1, 1, "t")), 5),
        ((TraceRequest(6, 1, 1, "t"),), 5),
        ((TraceRequest(-1, 1, 1, "t"),), 5),
        ((TraceRequest(float("nan"), 1, 1, "t"),), 5),
        ((TraceRequest(1, 0, 1, "t"),), 5),
        ((TraceRequest(1, 1, 0, "t"),), 5),
        ((), 0),
        ((), float("inf")),
    ],
)
def test_unsound_workloads_are_refused(requests: tuple[TraceRequest, ...], seconds: float) -> None:
    with pytest.raises(ValueError, match="workload 'w'"):
        Workload(requests, "w", seconds)


def test_a_workload_tells_about_itself() -> None:
    w = Workload((TraceRequest(1, 2, 3, "b"), TraceRequest(4, 5, 6, "a"), TraceRequest(4, 1, 1, "b")), "w", 6)
    assert (len(w), w.rate, w.tiers, w.arrivals().tolist()) == (3, 0.5, ("a", "b"), [1, 4, 4])
    assert [r.prompt_tokens for r in w.only("b").requests] == [2, 1]
    assert w.only("b").seconds == 6
    assert retier(w, "x").tiers == ("x",)


@given(workloads("a"), workloads("b"), workloads("a"))
def test_a_mix_holds_every_request_in_order(a: Workload, b: Workload, c: Workload) -> None:
    mixed = mix([a, b, c])
    assert bodies(mixed) == bodies(a) + bodies(b) + bodies(c)
    assert mixed.seconds == max(a.seconds, b.seconds, c.seconds)
    assert mixed.only("b").requests == b.requests
    again = mix([mix([a, b]), c])
    assert again.requests == mixed.requests


@given(workloads(), st.floats(0.5, 60), st.floats(0, 99))
def test_windows_side_by_side_hold_every_request_once(w: Workload, seconds: float, start: float) -> None:
    parts = []
    at = start
    while at < w.seconds:
        parts.append(window(w, at, seconds))
        at += seconds
    expected = [r for r in w.requests if r.arrival_s >= start]
    assert sum((bodies(p) for p in parts), Counts()) == bodies(dataclasses.replace(w, requests=tuple(expected)))
    assert sum(p.seconds for p in parts) == pytest.approx(w.seconds - start)


@given(workloads(), workloads())
def test_a_window_of_phases_is_the_phase(a: Workload, b: Workload) -> None:
    both = concatenate([a, b])
    assert both.seconds == a.seconds + b.seconds
    second = window(both, a.seconds, b.seconds)
    # A request at the very end of the first phase arrives as the second begins.
    own = second.requests[len(second) - len(b) :]
    assert [(r.prompt_tokens, r.output_tokens) for r in own] == [(r.prompt_tokens, r.output_tokens) for r in b.requests]
    assert [r.arrival_s for r in own] == pytest.approx([r.arrival_s for r in b.requests])


@pytest.mark.parametrize(
    ("start", "seconds"), [(-1, 2), (100, 2), (0, 0), (0, -1), (float("nan"), 1), (0, float("nan"))]
)
def test_windows_outside_are_refused(start: float, seconds: float) -> None:
    with pytest.raises(InvalidInputError, match="window of"):
        window(Workload((), "w", 100), start, seconds)


@given(workloads(), st.floats(0.1, 10))
def test_compressing_keeps_order_and_lengths(w: Workload, factor: float) -> None:
    squeezed = compress_time(w, factor)
    assert [(r.prompt_tokens, r.output_tokens) for r in squeezed.requests] == [
        (r.prompt_tokens, r.output_tokens) for r in w.requests
    ]
    assert squeezed.rate == pytest.approx(w.rate * factor)


@given(workloads(), st.floats(0.05, 5), st.floats(0.05, 5), st.integers(0, 5))
def test_scaled_workloads_nest(w: Workload, one: float, other: float, seed: int) -> None:
    low, high = (scale_rate(w, f, seed) for f in sorted((one, other)))
    assert not collections.Counter(low.requests) - collections.Counter(high.requests)
    assert low.seconds == high.seconds == w.seconds
    assert scale_rate(w, 1.0, seed).requests == w.requests
    assert scale_rate(w, one, seed) == scale_rate(w, one, seed)
    # Copies are whole, so whole factors hold each request that many times.
    whole = bodies(scale_rate(w, 3.0, seed))
    assert whole == Counts({k: 3 * n for k, n in bodies(w).items()})


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
def test_factors_out_of_range_are_refused(factor: float) -> None:
    for scale in (scale_rate, compress_time):
        with pytest.raises(InvalidInputError, match="rate factor"):
            scale(Workload((), "w", 1), factor)
    with pytest.raises(ValueError, match="shift_s"):
        scale_rate(Workload((), "w", 1), 2, shift_s=-1)


@pytest.mark.parametrize("factor", [0.3, 0.6, 1.5, 2.0, 4.3])
def test_scaling_keeps_the_rate_and_the_dispersion(factor: float) -> None:
    before = code_like()
    after = scale_rate(before, factor, seed=1)
    assert after.rate == pytest.approx(before.rate * factor, rel=0.01)
    for seconds in (0.3, 1.0, 3.0, 10.0):
        was = index_of_dispersion(before.arrivals(), before.seconds, seconds, within_s=600)
        now = index_of_dispersion(after.arrivals(), after.seconds, seconds, within_s=600)
        assert now == pytest.approx(was, rel=0.25), seconds
    # The plain ways do not: they are what the test must tell apart.
    if factor == 4.3:
        squeezed = compress_time(before, factor)
        assert index_of_dispersion(squeezed.arrivals(), squeezed.seconds, 1.0) > 2 * index_of_dispersion(
            before.arrivals(), before.seconds, 1.0
        )
    if factor == 0.3:
        singly = np.random.default_rng(0).random(len(before)) < factor
        assert index_of_dispersion(before.arrivals()[singly], before.seconds, 10.0) < 0.5 * index_of_dispersion(
            before.arrivals(), before.seconds, 10.0
        )


@pytest.mark.parametrize("factor", [0.5, 1.7, 3.0])
def test_scaling_keeps_slow_changes_in_place(factor: float) -> None:
    lengths = LognormalLengths(100, 0.5)
    course = steps([(0, 2.0), (1200, 10.0), (2400, 4.0)])
    before = generate([Stream("t", course, lengths, lengths)], 3600, 0)
    after = scale_rate(before, factor)
    ratio = window_counts(after.arrivals(), 3600, 300) / window_counts(before.arrivals(), 3600, 300)
    # Within shift_s of a step (and of the ends, round which copies go) some of a copy comes from the other side.
    inside = np.array([1, 2, 5, 6, 9, 10])
    assert ratio[inside] == pytest.approx(np.full(6, factor), rel=0.2)


def test_scaling_keeps_neighbours_together() -> None:
    """Prompt lengths that come in long waves: the correlation of neighbours within a copy survives thinning."""
    n = 6000
    at = np.cumsum(np.random.default_rng(0).gamma(0.02, 50, n))
    prompts = (1000 + 900 * np.sin(np.arange(n) / 20)).astype(int).tolist()
    w = Workload(tuple(TraceRequest(t, p, 1, "t") for t, p in zip(at.tolist(), prompts, strict=True)), "w", at[-1] + 1)

    def correlation(lengths: list[int]) -> float:
        return float(np.corrcoef(lengths[1:], lengths[:-1])[0, 1])

    thinned = [r.prompt_tokens for r in scale_rate(w, 0.2).requests]
    singly = [p for p, keep in zip(prompts, np.random.default_rng(1).random(n) < 0.2, strict=True) if keep]
    assert correlation(thinned) > correlation(singly) + 0.01
    assert correlation(thinned) > 0.97


@given(st.lists(st.floats(0, 99.99), max_size=50), st.floats(0.5, 30))
@settings(max_examples=50)
def test_window_counts_against_plain_counting(arrivals: list[float], width: float) -> None:
    counts = window_counts(sorted(arrivals), 100, width)
    assert len(counts) == int(100 / width)
    assert counts.tolist() == [sum(int(a / width) == i for a in arrivals) for i in range(len(counts))]


def test_index_of_dispersion_of_known_streams() -> None:
    poisson = np.sort(np.random.default_rng(0).uniform(0, 10_000, 50_000))
    assert index_of_dispersion(poisson, 10_000, 10) == pytest.approx(1, rel=0.15)
    assert index_of_dispersion(np.arange(1000.0), 1000, 10) == 0
    assert index_of_dispersion([], 1000, 10) == 1
    fives = np.repeat(poisson, 5)
    assert index_of_dispersion(fives, 10_000, 10) == pytest.approx(5, rel=0.15)
    # A slow ramp disperses the counts of the whole, hardly those of each stretch.
    ramp = np.sqrt(poisson * 10_000)
    assert index_of_dispersion(ramp, 10_000, 10) > 5
    assert index_of_dispersion(ramp, 10_000, 10, within_s=200) == pytest.approx(1, rel=0.2)
    assert constant(1).mean(10) == 1
