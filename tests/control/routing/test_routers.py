"""Which cell a request goes to."""

import dataclasses
import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.routing.cells import KnownCell, RoutedRequest
from nitsum_jax.control.routing.report import GRID, CellReport, make_report
from nitsum_jax.control.routing.routers import ROUTERS, PredictedRouter
from nitsum_jax.control.scheduling.forecast import TierForecast
from tests.control.cells import CHAT, CODE, COST, job, make_cell


def report(name: str = "a", **fields: object) -> CellReport:
    """An idle cell that prefills 10,000 tokens a second."""
    forecast = TierForecast("chat", 0.05, 0.010)
    whole = CellReport(name, 0.0, (forecast,), tuple(t / 1e4 for t in GRID), 0.0001, 0, 0, 100_000)
    return dataclasses.replace(whole, **fields)  # type: ignore[arg-type]


def waiting(name: str, wait_s: float, tpot_s: float = 0.010, tightest_s: float = math.inf) -> CellReport:
    return report(name, tiers=(TierForecast("chat", wait_s + 0.05, tpot_s, wait_s, 1.0, tightest_s),))


def known(reports: Iterable[CellReport]) -> list[KnownCell]:
    """Cells of which a report is there and nothing else."""
    return [KnownCell(one.cell, one) for one in reports]


ASK = RoutedRequest(CHAT, 500)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_uses_the_only_cell(name: str) -> None:
    (only,) = known([report()])
    assert ROUTERS[name](0).choose(ASK, [only], 0.1) is only


def test_round_robin_takes_turns() -> None:
    cells = known(map(report, "abc"))
    router = ROUTERS["round_robin"](0)
    assert [router.choose(ASK, cells, 0.0).name for _ in range(4)] == ["a", "b", "c", "a"]


@pytest.mark.parametrize("name", ["least_queue", "power_of_two", "prefix"])
def test_queues_are_compared(name: str) -> None:
    cells = known([report("a", waiting=3), report("b", running=1)])
    assert {ROUTERS[name](seed).choose(ASK, cells, 0.0).name for seed in range(8)} == {"b"}


def test_a_request_goes_where_it_meets_both_targets() -> None:
    slow_first, slow_each, good = waiting("a", 0.6), waiting("b", 0.0, tpot_s=0.03), waiting("c", 0.2, tpot_s=0.02)
    assert PredictedRouter().choose(ASK, known([slow_first, slow_each, good]), 0.0).name == "c"


def test_it_goes_where_nobody_is_slowed_down_below_his_target() -> None:
    crowded = waiting("a", 0.0, tpot_s=0.020, tightest_s=0.021)
    busy = waiting("b", 0.1, tpot_s=0.020)
    assert PredictedRouter().choose(ASK, known([crowded, busy]), 0.0).name == "b"


def test_a_prefix_decides_while_no_target_suffers() -> None:
    ask = dataclasses.replace(ASK, prefixes=((64, b"short"), (256, b"long")))
    holds = frozenset((b"long",))
    idle, holder = waiting("a", 0.0), dataclasses.replace(waiting("b", 0.1), prefixes=holds)
    assert PredictedRouter().choose(ask, known([idle, holder]), 0.0).name == "b"
    late_holder = dataclasses.replace(waiting("b", 0.35), prefixes=holds)
    assert PredictedRouter().choose(ask, known([idle, late_holder]), 0.0).name == "a"
    assert ROUTERS["prefix"](0).choose(ask, known([idle, late_holder]), 0.0).name == "b"  # whatever it costs


def test_a_full_cell_is_left_alone() -> None:
    full, slow = report("a", free_tokens=100), waiting("b", 0.3)
    assert PredictedRouter().choose(ASK, known([full, slow]), 0.0).name == "b"


def test_a_cell_that_has_not_reported_comes_last() -> None:
    assert PredictedRouter().choose(ASK, [KnownCell("new"), *known([waiting("late", 9.0)])], 0.0).name == "late"


def test_what_was_sent_since_the_report_counts() -> None:
    cells = known([report("a"), report("b")])
    router = PredictedRouter()
    names = []
    for _ in range(8):
        cell = router.choose(ASK, cells, 0.001)
        cell.sent(ASK, 0.001)
        names.append(cell.name)
    assert names.count("a") == names.count("b") == 4


def test_what_was_sent_is_worked_off_and_then_in_the_report() -> None:
    (cell,) = known([report()])
    for _ in range(4):
        cell.sent(ASK, 1.0)
    assert cell.wait_s("chat", 1.0) == pytest.approx(4 * 0.05)
    assert cell.wait_s("chat", 1.15) == pytest.approx(0.05)
    assert cell.wait_s("chat", 9.0) == 0
    assert (cell.queue, cell.open) == (4, 4)
    cell.reported(report(time_s=2.0, running=4))
    assert (cell.queue, cell.since, cell.open) == (4, 0, 4)
    cell.reported(report(time_s=3.0, running=6, waiting=1))
    assert cell.queue == 7  # three are another router's
    cell.ended()
    assert (cell.open, cell.queue) == (3, 6)


def test_with_old_reports_not_every_router_chooses_the_same_cell() -> None:
    reports = [waiting(str(n), 3.4 + 0.25 * n) for n in range(8)]
    patient = dataclasses.replace(ASK, tier=dataclasses.replace(CHAT, ttft_ms=6000))
    fresh = {PredictedRouter(seed).choose(patient, known(reports), 0.4).name for seed in range(20)}
    old = {PredictedRouter(seed).choose(patient, known(reports), 1.5).name for seed in range(20)}
    assert fresh <= {"0", "1"}
    assert len(old) > 3


@given(st.integers(1, 30_000), st.integers(0, 30_000))
def test_a_prefill_with_a_held_prefix_is_between_its_parts_and_the_whole(tokens: int, held: int) -> None:
    rest = report().rest_s(tokens, held)
    assert rest <= report().alone_s(tokens) + 1e-9
    assert rest >= report().alone_s(tokens - min(held, tokens - 1)) - 1e-9


def test_a_cells_report_says_what_its_scheduler_predicts() -> None:
    cell, _ = make_cell(homogeneous(2, 1))
    idle = make_report("c", cell.scheduler, cell.workers, 0.0, prefixes=frozenset((b"k",)))
    assert [one.tier for one in idle.tiers] == ["chat", "code"]
    for tokens in (64, 1024, 4096):
        assert idle.alone_s(tokens) == pytest.approx(COST.prefill_s(1, tokens), rel=0.01)
    assert (idle.waiting, idle.running) == (0, 0)
    assert idle.prefixes == {b"k"}
    for number in range(6):
        cell.add(job(number, CODE, prompt=3000, output=300))
    cell.run_until(0.2)
    cell.settle()
    busy = make_report("c", cell.scheduler, cell.workers, 0.2)
    assert busy.running + busy.waiting == 6
    assert busy.free_tokens < idle.free_tokens
    assert busy.tier("chat").ttft_s > idle.tier("chat").ttft_s
    assert busy.tier("unknown").ttft_s == math.inf
    assert idle.growth_s > 0
