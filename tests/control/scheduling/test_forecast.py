"""What is forecast is what the model of a cell then does."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.scheduling.forecast import forecast
from nitsum_jax.control.scheduling.scheduler import SchedulerConfig
from nitsum_jax.control.tiers import Tier
from tests.control.cells import CHAT, CODE, COST, TIERS, job, make_cell


@pytest.mark.parametrize(("tp", "prompt"), [(1, 512), (2, 512), (4, 4096)])
def test_an_idle_cell_does_what_is_forecast(tp: int, prompt: int) -> None:
    cell, steps = make_cell(homogeneous(4, tp))
    said = forecast(cell.scheduler, cell.workers, CODE, 0.0, prompt)
    cell.add(job(0, CODE, prompt=prompt, output=50))
    cell.run_until(math.inf)
    (done,) = steps.done
    assert done.first_token_s is not None
    assert done.finish_s is not None
    # A long prompt is cut into chunks, which attend to each other: a little more than at once.
    assert done.first_token_s == pytest.approx(said.ttft_s, rel=0.15)
    assert (done.finish_s - done.first_token_s) / 49 == pytest.approx(said.tpot_s, rel=0.05)
    assert said.wait_s == 0.0


def test_prompts_before_it_are_waited_for() -> None:
    cell, steps = make_cell(homogeneous(1, 1))
    before = [job(number, CODE, prompt=8000, output=2) for number in range(4)]
    for one in before:
        cell.add(one)
    cell.run_until(0.01)
    said = forecast(cell.scheduler, cell.workers, CODE, 0.01, 512)
    cell.add(job(9, CODE, 0.01, prompt=512, output=2))
    cell.run_until(math.inf)
    last = next(one for one in steps.done if one.id == job(9).id)
    assert last.first_token_s is not None
    assert said.ttft_s == pytest.approx(last.first_token_s - 0.01, rel=0.25)
    assert said.wait_s > 3 * COST.prefill_s(1, 512)


def test_what_decodes_makes_prompts_slower_and_is_named() -> None:
    cell, _ = make_cell(homogeneous(1, 1))
    idle = forecast(cell.scheduler, cell.workers, CODE, 0.0)
    for number in range(8):
        cell.add(job(number, CHAT, prompt=200, output=1000))
    cell.run_until(1.0)
    busy = forecast(cell.scheduler, cell.workers, CODE, 1.0)
    assert busy.ttft_s > idle.ttft_s
    assert busy.tpot_s > idle.tpot_s
    assert busy.tightest_s == CHAT.tpot_ms / 1000
    assert idle.tightest_s == math.inf


def test_a_cell_of_other_tiers_takes_nobody() -> None:
    cell, _ = make_cell(place([Shape(1, tiers=("code",))], 1), config=SchedulerConfig(tiers_apart=True))
    assert forecast(cell.scheduler, cell.workers, CHAT, 0.0).ttft_s == math.inf
    assert forecast(cell.scheduler, cell.workers, CODE, 0.0).ttft_s < 1


@given(st.lists(st.integers(1, 6000), max_size=12), st.floats(0, 3))
def test_it_is_finite_and_grows_with_the_prompt(prompts: list[int], at_s: float) -> None:
    cell, _ = make_cell(homogeneous(2, 1))
    for number, prompt in enumerate(prompts):
        cell.add(job(number, TIERS[number % 2], prompt=prompt, output=40))
    cell.run_until(at_s)
    cell.settle()
    for tier in TIERS:
        short, long = (forecast(cell.scheduler, cell.workers, tier, at_s, size) for size in (64, 4096))
        assert 0 < short.ttft_s <= long.ttft_s < math.inf
        assert 0 < short.tpot_s < math.inf
        assert short.stretch >= 1


def test_targets_of_its_own_order_the_queue() -> None:
    cell, steps = make_cell(homogeneous(1, 1))
    slow = Tier("code", 60_000, 200)
    for number in range(6):
        cell.add(job(number, slow, prompt=6000, output=2))
    hurried = job(9, slow.with_targets(900, 150), prompt=300, output=2)
    cell.add(hurried)
    cell.run_until(math.inf)
    assert steps.done[0].id == hurried.id or steps.done[1].id == hurried.id
    assert hurried.met()
