"""Metrics: against a plain reading of the records."""

import itertools
import json
import math
import pathlib
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.job import met
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.runs.metrics import measure, over_time, summary, table, tiers_of, to_json
from nitsum_jax.sim.runs.records import RequestRecord, StepRecord, SwitchRecord
from nitsum_jax.sim.runs.tables import RequestTable, StepTable
from tests.sim.small_run import DEVICES, TIERS, run, workload

PAIR = TierSet((Tier("a", ttft_ms=500, tpot_ms=20, weight=3), Tier("b", ttft_ms=2000, tpot_ms=100)))


def request(
    tier: str, arrival: float, first: float | None, finish: float | None, output: int = 11, id: str = "x"
) -> RequestRecord:
    return RequestRecord(id, tier, arrival, 7, output, first, finish, (0,), False)


@st.composite
def requests(draw: st.DrawFn) -> RequestRecord:
    arrival = draw(st.floats(0, 50))
    first = draw(st.none() | st.floats(0, 3).map(lambda d: arrival + d))
    finish = None if first is None else draw(st.none() | st.floats(0, 3).map(lambda d: first + d))
    return request(draw(st.sampled_from(["a", "b"])), arrival, first, finish, draw(st.integers(1, 40)))


@given(st.lists(requests(), max_size=30))
def test_metrics_against_plain_reading(rows: list[RequestRecord]) -> None:
    found = measure(RequestTable.of(rows), PAIR, 60.0)
    good = [r for r in rows if met(PAIR.get(r.tier), r.arrival_s, r.first_token_s, r.finish_s, r.output_tokens)]
    assert found.total.met == len(good)
    assert found.total.attainment == (len(good) / len(rows) if rows else 1.0)
    assert found.total.goodput == len(good) / 60
    assert found.weighted_goodput == pytest.approx(sum(PAIR.get(r.tier).weight for r in good) / 60)
    assert found.rate == len(rows) / 60
    assert found.total.finished == sum(r.finish_s is not None for r in rows)
    for name in PAIR.names:
        assert found.tiers[name].requests == sum(r.tier == name for r in rows)
        assert found.tiers[name].met == sum(r.tier == name for r in good)
    ttft = sorted((r.first_token_s - r.arrival_s) * 1000 for r in rows if r.first_token_s is not None)
    tpot = sorted(
        (r.finish_s - r.first_token_s) / (r.output_tokens - 1) * 1000
        for r in rows
        if r.finish_s is not None and r.first_token_s is not None and r.output_tokens > 1
    )
    for ours, plain in ((found.total.ttft_ms, ttft), (found.total.tpot_ms, tpot)):
        assert ours["p50"] == (pytest.approx(statistics.median(plain)) if plain else None)
        for p in (90, 99):
            at = p / 100 * (len(plain) - 1)
            low = math.floor(at)
            expected = plain[low] + (at - low) * (plain[min(low + 1, len(plain) - 1)] - plain[low]) if plain else None
            assert ours[f"p{p}"] == (pytest.approx(expected) if plain else None)


@pytest.mark.parametrize(
    ("first", "finish", "output", "expected"),
    [
        (0.5, 0.7, 11, True),  # both exactly on target
        (0.5001, 0.7, 11, False),
        (0.5, 0.7001, 11, False),
        (0.5, 99.0, 1, True),  # one token needs only the first target
        (0.4, None, 11, False),
        (0.4, None, 1, False),
        (None, None, 11, False),
    ],
)
def test_met(first: float | None, finish: float | None, output: int, expected: bool) -> None:
    table = RequestTable.of([request("a", 0.0, first, finish, output)])
    assert table.recomputed_met(PAIR).tolist() == [expected]


def test_unknown_tiers_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="unknown tier 'c'"):
        measure(RequestTable.of([request("c", 0, 1, 2)]), PAIR, 1)
    with pytest.raises(ValueError, match="seconds"):
        measure(RequestTable.of([]), PAIR, 0)
    with pytest.raises(ValueError, match="devices"):
        measure(RequestTable.of([]), PAIR, 1, steps=StepTable.of([]))


def step(
    start: float, end: float, devices: tuple[int, ...], prefill: tuple[int, ...] = (), decode: int = 1
) -> StepRecord:
    return StepRecord(len(devices), devices, len(devices), start, end, decode, 10, prefill, (0,) * len(prefill))


def test_utilisation_counts_device_time_inside_the_workload() -> None:
    steps = StepTable.of([step(0, 2, (0, 1)), step(1, 3, (2,), (5, 6), 0), step(9, 12, (0, 1), (7,))])
    found = measure(RequestTable.of([]), PAIR, 10, devices=4, steps=steps)
    assert found.utilisation == pytest.approx((2 * 2 + 2 * 1 + 1 * 2) / 40)
    assert (found.steps, found.decode_tokens, found.prefill_tokens) == (3, 2, 18)
    assert steps.busy_device_s([0, 1, 2, 4, 12]).tolist() == pytest.approx([2, 3, 1, 6])
    assert steps.prefill_tokens.tolist() == [0, 11, 7]
    assert list(steps.chunks()) == [(), ((5, 0), (6, 0)), ((7, 0),)]
    assert steps.roles() == {1: "prefill", 2: "mixed"}
    assert found.switches is None
    with pytest.raises(ValueError, match="step 1 has not one context"):
        StepTable.of([StepRecord(0, (0,), 1, 0, 1, 1, 1, (5,), ())])


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(0, 5), st.integers(1, 4)), max_size=20),
    st.lists(st.floats(0, 25), min_size=2, max_size=8).map(sorted),
)
def test_busy_time_against_plain_sums(rows: list[tuple[float, float, int]], edges: list[float]) -> None:
    steps = StepTable.of([step(a, a + d, tuple(range(n))) for a, d, n in rows])
    expected = [
        sum(n * max(0.0, min(a + d, high) - max(a, low)) for a, d, n in rows) for low, high in itertools.pairwise(edges)
    ]
    assert steps.busy_device_s(edges) == pytest.approx(np.array(expected), abs=1e-9)


def test_switches_add_up() -> None:
    switches = [SwitchRecord(t, "tp1@0", "tp1@0", (0,), 0.25, 100.0, 2, 0) for t in (1, 2)]
    found = measure(RequestTable.of([]), PAIR, 10, switches=switches)
    assert (found.switches, found.stall_s, found.kv_bytes_moved) == (2, 0.5, 200)
    assert found.utilisation is None


def test_over_time_counts_by_arrival() -> None:
    rows = [
        request("a", 0.5, 0.6, 0.7),
        request("a", 1.5, 9.0, 9.1),
        request("a", 1.6, 1.7, 1.8),
        request("b", 9, None, None),
    ]
    arrived, good = over_time(RequestTable.of(rows), PAIR, [0, 1, 2, 10])
    assert arrived.tolist() == [1, 2, 1]
    assert good.tolist() == [1, 1, 0]


def test_summary_and_table_of_a_run(tmp_path: pathlib.Path) -> None:
    logs = run(tmp_path, workload(seconds=5))
    found = measure(logs.requests, TIERS, 5.0, devices=DEVICES, steps=logs.steps, switches=logs.switches)
    assert json.loads(to_json(summary(found, TIERS, policy="half-way"))).items() <= logs.summary.items()
    assert tiers_of(logs.summary) == TIERS
    text = table({"one": found})
    assert text.count("\n") == 2
    assert f"| {found.total.attainment:.1%} |" in text
    assert all(line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines())
    empty = measure(RequestTable.of([]), TIERS, 1)
    assert "- / -" in table({"none": empty})
    assert json.loads(to_json(summary(empty, TIERS)))["total"]["ttft_ms"]["p50"] is None
