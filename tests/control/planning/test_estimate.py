"""Rates and lengths: quick on changes, slow on noise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.planning.estimate import EstimatorConfig, WorkloadEstimator


def feed(estimator: WorkloadEstimator, times: list[float], prompt: int = 100) -> None:
    for time_s in times:
        estimator.arrived(time_s, "chat", prompt)


def poisson(rate: float, start_s: float, end_s: float, seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    return sorted(generator.uniform(start_s, end_s, generator.poisson(rate * (end_s - start_s))).tolist())


def rate_at(estimator: WorkloadEstimator, now_s: float) -> float:
    return estimator.loads(now_s)[0].rate


def test_a_tier_that_nobody_used_has_no_load() -> None:
    estimator = WorkloadEstimator(["chat", "code"])
    feed(estimator, [0.5])
    assert [load.tier for load in estimator.loads(2.0)] == ["chat"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_cut_the_window(seed: int) -> None:
    estimator = WorkloadEstimator(["chat"])
    feed(estimator, poisson(10, 0, 120, seed))
    # 60 s of 10/s: the error of the mean is about 0.4; 8 s alone would have 1.1.
    assert rate_at(estimator, 120) == pytest.approx(10, abs=1.5)


@pytest.mark.parametrize(("before", "after"), [(2.0, 12.0), (12.0, 1.0)])
def test_a_step_is_seen_within_ten_seconds(before: float, after: float) -> None:
    estimator = WorkloadEstimator(["chat"])
    feed(estimator, poisson(before, 0, 100, 1) + poisson(after, 100, 110, 2))
    assert rate_at(estimator, 110) == pytest.approx(after, rel=0.35, abs=1.0)


def test_silence_is_a_rate_of_zero() -> None:
    estimator = WorkloadEstimator(["chat"])
    feed(estimator, poisson(10, 0, 60, 3))
    assert rate_at(estimator, 200) == 0


def test_bursts_are_told_from_even_arrivals() -> None:
    even, bursty = WorkloadEstimator(["chat"]), WorkloadEstimator(["chat"])
    feed(even, [i / 10 for i in range(600)])
    feed(bursty, sorted(10 * (i // 100) + (i % 100) / 1000 for i in range(600)))
    assert even.loads(60)[0].dispersion == 1.0
    assert bursty.loads(60)[0].dispersion > 10


def test_lengths_follow_a_change() -> None:
    config = EstimatorConfig()
    estimator = WorkloadEstimator(["chat"], config)
    generator = np.random.default_rng(0)
    for length in [*generator.lognormal(5, 0.5, 256), *generator.lognormal(7, 0.5, 2 * config.recent_lengths)]:
        estimator.arrived(0.0, "chat", int(length))
        estimator.finished(0.0, "chat", int(length))
    assert estimator.output("chat") == pytest.approx(np.exp(7.125), rel=0.25)
    assert min(estimator.loads(0.0)[0].prompts) > 300


def test_few_outputs_do_not_pull_the_expectation_down() -> None:
    # What has ended first is what was short.
    estimator = WorkloadEstimator(["chat"], output=200)
    estimator.finished(1.0, "chat", 3)
    assert estimator.output("chat") > 150


@given(st.lists(st.floats(0, 300, allow_nan=False), min_size=1, max_size=200))
def test_rates_are_never_negative_and_never_above_what_came(times: list[float]) -> None:
    estimator = WorkloadEstimator(["chat"])
    feed(estimator, sorted(times))
    for now in (max(times), max(times) + 1, max(times) + 1000):
        assert 0 <= rate_at(estimator, now) <= len(times)
