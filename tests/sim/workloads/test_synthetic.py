"""Synthetic workloads: reproducible, of the asked rate, lengths and burstiness, and following their schedules."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.workloads import azure_2023
from nitsum_jax.sim.workloads.schedules import Schedule, bursts, constant, day_curve, ramps, steps
from nitsum_jax.sim.workloads.stand_ins import STAND_INS, stand_in_stream
from nitsum_jax.sim.workloads.synthetic import (
    Arrivals,
    EmpiricalLengths,
    GammaArrivals,
    LognormalLengths,
    ModulatedArrivals,
    PoissonArrivals,
    Stream,
    generate,
)
from nitsum_jax.sim.workloads.traces import to_csv
from nitsum_jax.sim.workloads.workload import index_of_dispersion, window_counts

FIXED = LognormalLengths(100, 0)
ARRIVALS = [PoissonArrivals(), GammaArrivals(0.5), GammaArrivals(3), ModulatedArrivals(((0.1, 0.5), (0.3, 0.5)))]


def random() -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(7))


# Schedules


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    times = sorted(draw(st.lists(st.integers(0, 20), min_size=1, max_size=6)))
    return Schedule(tuple((float(t), draw(st.floats(0, 9))) for t in times))


@given(schedules())
def test_schedule_against_plain_reading(schedule: Schedule) -> None:
    """Between two different times the value lies on the line of the last point of one and the first of the next."""
    points = schedule.points
    for t in np.arange(-1, 22, 0.5).tolist():
        before = [p for p in points if p[0] <= t]
        after = [p for p in points if p[0] > t]
        if not before:
            expected = points[0][1]
        elif not after:
            expected = points[-1][1]
        else:
            (a, va), (b, vb) = before[-1], after[0]
            expected = va + (vb - va) * (t - a) / (b - a)
        assert float(schedule.at(t)) == pytest.approx(expected)
        assert float(schedule.before(t)) == pytest.approx(float(schedule.at(t - 1e-9)), abs=1e-6)


@given(schedules(), st.floats(0.5, 30))
def test_schedule_mean_is_the_integral(schedule: Schedule, seconds: float) -> None:
    fine = (np.arange(20_000) + 0.5) * seconds / 20_000
    assert schedule.mean(seconds) == pytest.approx(float(schedule.at(fine).mean()), abs=5e-3)
    assert schedule.scaled(2).mean(seconds) == pytest.approx(2 * schedule.mean(seconds))


def test_kinds_of_schedules() -> None:
    assert steps([(0, 1), (10, 5)]).at([0, 9.9, 10, 99]).tolist() == [1, 1, 5, 5]
    assert steps([(0, 1), (10, 5)]).before([10]).tolist() == [1]
    assert ramps([(0, 1), (10, 5)]).at([-1, 0, 5, 10, 99]).tolist() == [1, 1, 3, 5, 5]
    day = day_curve(2, 10)
    assert day.at([0, 21_600, 43_200, 86_400]) == pytest.approx([2, 6, 10, 2], abs=1e-9)
    assert day.mean(86_400) == pytest.approx(6)
    regular = bursts(1, 9, every_s=60, lasting_s=6, seconds=600, seed=None)
    assert regular.at([0, 5.9, 6, 59, 60, 66]).tolist() == [9, 9, 1, 1, 9, 1]
    drawn = bursts(1, 9, every_s=60, lasting_s=6, seconds=600, seed=3)
    assert drawn == bursts(1, 9, every_s=60, lasting_s=6, seconds=600, seed=3) != regular
    assert drawn.mean(600) == pytest.approx(regular.mean(600)) == pytest.approx(1.8)


@pytest.mark.parametrize("points", [(), ((0, -1),), ((1, 1), (0, 1)), ((0, float("nan")),), ((float("inf"), 1),)])
def test_unsound_schedules_are_refused(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(InvalidInputError, match="schedule"):
        Schedule(points)
    with pytest.raises(InvalidInputError, match="day curve"):
        day_curve(3, 1)
    with pytest.raises(InvalidInputError, match="bursts"):
        bursts(1, 2, every_s=1, lasting_s=1, seconds=3)


# Arrivals


@pytest.mark.parametrize("arrivals", ARRIVALS, ids=str)
def test_arrivals_follow_the_rate(arrivals: Arrivals) -> None:
    course = Schedule(((0, 0), (500, 40), (500, 0), (700, 0), (700, 20), (1000, 20)))
    at = arrivals.times(random(), course, 1000)
    assert np.all(np.diff(at) >= 0)
    assert at[0] >= 0
    assert at[-1] <= 1000
    counts = window_counts(at, 1000, 100)
    expected = np.array([400, 1200, 2000, 2800, 3600, 0, 0, 2000, 2000, 2000])
    assert counts[5] == counts[6] == 0
    busy = expected > 0
    assert counts[busy] == pytest.approx(expected[busy], rel=0.25)
    assert len(at) == pytest.approx(16_000, rel=0.05)


@pytest.mark.parametrize("arrivals", ARRIVALS, ids=str)
def test_no_rate_no_arrivals(arrivals: Arrivals) -> None:
    assert len(arrivals.times(random(), constant(0), 100)) == 0


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_have_their_mean_and_variation(cv: float) -> None:
    at = GammaArrivals(cv).times(random(), constant(5), 8000)
    gaps = np.diff(at)
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)
    assert index_of_dispersion(at, 8000, 80) == pytest.approx(cv**2, rel=0.4)


def test_poisson_is_poisson() -> None:
    at = PoissonArrivals().times(random(), constant(5), 8000)
    assert np.diff(at).std() / np.diff(at).mean() == pytest.approx(1, rel=0.03)
    assert index_of_dispersion(at, 8000, 10) == pytest.approx(1, rel=0.15)


def test_modulated_arrivals_have_the_expected_dispersion() -> None:
    arrivals = ModulatedArrivals(((0.5, 1.0), (10, 2.0)), exact=False)
    at = arrivals.times(random(), constant(4), 40_000)
    for seconds in (0.2, 1, 5, 30):
        expected = arrivals.expected_dispersion(4, seconds)
        assert index_of_dispersion(at, 40_000, seconds) == pytest.approx(expected, rel=0.15), seconds
    # One scale alone has a closed form: 1 + 2 rate v tau (1 - tau/w (1 - exp(-w/tau))).
    one = ModulatedArrivals(((10.0, 2.0),)).expected_dispersion(4, 30)
    assert one == pytest.approx(1 + 2 * 4 * 2 * 10 * (1 - 10 / 30 * (1 - np.exp(-3))), rel=1e-4)
    exact = ModulatedArrivals(((0.5, 1.0), (10, 2.0)))
    assert {len(exact.times(np.random.default_rng(s), constant(4), 100)) for s in range(5)} == {400}


@pytest.mark.parametrize(
    "make",
    [
        lambda: GammaArrivals(0),
        lambda: GammaArrivals(float("nan")),
        lambda: ModulatedArrivals(()),
        lambda: ModulatedArrivals(((0, 1),)),
        lambda: ModulatedArrivals(((1, -1),)),
        lambda: LognormalLengths(0.5, 1),
        lambda: LognormalLengths(10, -1),
        lambda: LognormalLengths(10, 1, longest=5),
        lambda: EmpiricalLengths((0.0, 1.0), (1.0,)),
        lambda: EmpiricalLengths((0.0, 0.5), (1.0, 2.0)),
        lambda: EmpiricalLengths((0.0, 1.0), (2.0, 1.0)),
        lambda: EmpiricalLengths((0.0, 1.0), (0.0, 1.0)),
        lambda: EmpiricalLengths.of([]),
        lambda: generate([], 1, 0),
        lambda: generate([Stream("t", constant(1), FIXED, FIXED)], 0, 0),
        lambda: generate([Stream("t", constant(1), FIXED, FIXED)], 1, -1),
        lambda: stand_in_stream("azure-like", "t"),
    ],
)
def test_numbers_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(InvalidInputError) as e:
        make()  # type: ignore[operator]
    assert "\n" not in str(e.value)


# Lengths


def test_lognormal_lengths() -> None:
    drawn = LognormalLengths(1000, 0.8).sample(random(), 50_000)
    assert drawn.mean() == pytest.approx(1000, rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.02)
    assert LognormalLengths(1000, 0.8, longest=1200).sample(random(), 1000).max() == 1200
    assert FIXED.sample(random(), 10) == pytest.approx(np.full(10, 100))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
@settings(max_examples=25)
def test_empirical_lengths_are_those_of_the_trace(lengths: list[int]) -> None:
    drawn = EmpiricalLengths.of(lengths).sample(random(), 4000)
    values, counts = np.unique(np.rint(drawn), return_counts=True)
    assert set(values.tolist()) <= set(lengths)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        assert count / 4000 == pytest.approx(lengths.count(int(value)) / len(lengths), abs=0.04)


# Workloads


def test_a_seed_gives_the_same_bits_and_streams_are_independent() -> None:
    chat = stand_in_stream("azure-conv-like", "chat")
    code = stand_in_stream("azure-code-like", "code")
    both = generate([chat, code], 300, 5)
    assert both == generate([chat, code], 300, 5)
    assert both.requests != generate([chat, code], 300, 6).requests
    assert both.only("chat").requests == generate([chat], 300, 5).requests
    assert both.tiers == ("chat", "code")
    # The very bits, so that a change of what a seed means does not go unseen.
    small = generate([Stream("t", constant(2), LognormalLengths(99, 1), FIXED, GammaArrivals(2))], 50, 1)
    rounded = [(round(r.arrival_s, 6), r.prompt_tokens) for r in small.requests]
    assert hashlib.sha256(repr(rounded).encode()).hexdigest()[:16] == "0dc90502fb3dd086"
    assert to_csv(small) == to_csv(
        generate([Stream("t", constant(2), LognormalLengths(99, 1), FIXED, GammaArrivals(2))], 50, 1)
    )


def test_shares_and_lengths_move_by_schedule() -> None:
    early = Stream("a", steps([(0, 9), (500, 1)]), LognormalLengths(500, 0.3), FIXED)
    late = Stream(
        "b",
        steps([(0, 1), (500, 9)]),
        FIXED,
        FIXED,
        prompt_scale=steps([(0, 1), (500, 4)]),
        output_scale=constant(0.001),
    )
    w = generate([early, late], 1000, 0, "shift")
    first = [r for r in w.requests if r.arrival_s < 500]
    second = [r for r in w.requests if r.arrival_s >= 500]
    assert sum(r.tier == "a" for r in first) / len(first) == pytest.approx(0.9, abs=0.02)
    assert sum(r.tier == "a" for r in second) / len(second) == pytest.approx(0.1, abs=0.02)
    assert {r.prompt_tokens for r in first if r.tier == "b"} == {100}
    assert {r.prompt_tokens for r in second if r.tier == "b"} == {400}
    assert {r.output_tokens for r in w.requests if r.tier == "b"} == {1}  # never below one token
    assert (w.name, w.seconds) == ("shift", 1000)


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins_are_like_their_traces(name: str) -> None:
    figures = STAND_INS[name]
    stream = stand_in_stream(name, "t")
    w = generate([stream], figures.seconds, 2)
    assert len(w) == figures.requests
    assert np.mean([r.prompt_tokens for r in w.requests]) == pytest.approx(figures.mean_prompt, rel=0.03)
    assert np.mean([r.output_tokens for r in w.requests]) == pytest.approx(figures.mean_output, rel=0.06)
    # Ten hours, as the dispersion of a single hour is itself random.
    long = generate([stream], 10 * figures.seconds, 0).arrivals()
    for seconds, measured in zip(azure_2023.WINDOWS_S, figures.dispersion, strict=True):
        if seconds <= 60:
            ours = index_of_dispersion(long, 10 * figures.seconds, seconds)
            assert ours == pytest.approx(measured, rel=0.2), seconds


def test_stand_ins_differ_in_burstiness() -> None:
    conv, code = (stand_in_stream(n, "t") for n in ("azure-conv-like", "azure-code-like"))
    same_rate = dataclasses.replace(code, rate=conv.rate)
    minutes = [window_counts(generate([s], 3600, 1).arrivals(), 3600, 60) for s in (conv, same_rate)]
    assert minutes[0].max() < 2 * minutes[0].mean()
    assert minutes[1].max() > 2.5 * minutes[1].mean()
