"""The queueing estimate against the model of a cell, and what it must get right by itself."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from nitsum_jax.control.model.cell import CellModel, ModelWorker, Recorder
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import Shape, place
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.queueing import QueueingModel
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier
from tests.control.profiles import roofline_profile

COST = CostModel(roofline_profile())
CHAT, CODE = Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100)
TIERS = {"chat": CHAT, "code": CODE}
CHAT_PROMPTS = (100, 300, 500, 800, 1000, 1200, 1500, 2500)
CODE_PROMPTS = (500, 1000, 1500, 2000, 2500, 3000, 4000, 6000)

Shapes = tuple[Shape, ...]


def loads(chat: float, code: float) -> tuple[TierLoad, ...]:
    return TierLoad("chat", chat, 1.0, CHAT_PROMPTS, 200.0), TierLoad("code", code, 1.0, CODE_PROMPTS, 30.0)


def simulated(
    shapes: Shapes, offered: tuple[TierLoad, ...], tiers: Mapping[str, Tier] = TIERS, seconds: float = 30.0
) -> float:
    """Share of the requests that meet both targets in the model of a cell."""
    generator = np.random.default_rng(7)
    jobs = []
    for load in offered:
        tier = tiers[load.tier]
        for time_s in generator.uniform(0, seconds, generator.poisson(load.rate * seconds)):
            output = 1 + int(generator.exponential(load.output))
            jobs.append((time_s, tier, int(generator.choice(load.prompts)), output))

    class Tally(Recorder):
        met = 0

        def finished(self, job: ModelJob) -> None:
            self.met += job.met()

    tally = Tally()
    scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(COST, tuple(tiers.values()))
    for load in offered:
        scheduler.expect_output(load.tier, load.output)
    cell = CellModel(COST, scheduler, place(shapes, 8), recorder=tally)
    for i, (time_s, tier, prompt, output) in enumerate(sorted(jobs, key=lambda job: job[0])):
        cell.run_until(time_s)
        cell.add(ModelJob(str(i), tier, time_s, prompt, output))
    cell.run_until(float("inf"))
    return tally.met / len(jobs)


def predicted(shapes: Shapes, chat: float, code: float) -> float:
    model = QueueingModel(COST, TIERS, loads(chat, code))
    return model.predict(shapes).goodput / model.offered


PLANS: dict[str, Shapes] = {
    "tp1x8": (Shape(1),) * 8,
    "tp2x4": (Shape(2),) * 4,
    "tp4x2": (Shape(4),) * 2,
    "tp8": (Shape(8),),
    "tp4/chat+tp1x4/code": (Shape(4, tiers=("chat",)), *(Shape(1, tiers=("code",)),) * 4),
    "split": (*(Shape(1, "prefill"),) * 4, Shape(4, "decode")),
}


@pytest.mark.parametrize("plan", PLANS)
def test_light_load_is_met_wherever_the_time_per_token_can_be(plan: str) -> None:
    can = any(COST.step_s(shape.tp, 1, 1000) < CHAT.tpot_ms / 1000 * 0.92 for shape in PLANS[plan])
    assert predicted(PLANS[plan], 1, 1) == pytest.approx(1.0 if can else 0.5, abs=0.05)
    assert simulated(PLANS[plan], loads(1, 1)) == pytest.approx(1.0 if can else 0.5, abs=0.12)


@pytest.mark.parametrize(("chat", "code"), [(10, 40), (60, 5), (40, 40)])
def test_the_plan_it_ranks_first_is_nearly_the_best(chat: float, code: float) -> None:
    best = max(PLANS, key=lambda plan: predicted(PLANS[plan], chat, code))
    truth = {plan: simulated(shapes, loads(chat, code)) for plan, shapes in PLANS.items()}
    assert truth[best] >= 0.93 * max(truth.values()), (best, truth)


def test_more_load_never_has_more_attainment() -> None:
    for shapes in PLANS.values():
        model = QueueingModel(COST, TIERS, loads(20, 20))
        shares = [model.predict(shapes, scale).goodput / scale for scale in (0.25, 0.5, 1, 2, 4, 8)]
        assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(shares)), shares


def test_overload_serves_the_shortest_prompts() -> None:
    """As many as fit: those that the scheduler keeps when it gives up the longest (Moore 1968)."""
    model = QueueingModel(COST, TIERS, loads(0.0, 400.0))
    prediction = model.predict((Shape(1),) * 8)
    assert prediction.load > 1.5
    share = prediction.attainment["code"]
    assert share > 1.2 / prediction.load  # all alike would be served one time in `load`
    assert share == pytest.approx(simulated((Shape(1),) * 8, loads(0, 400), seconds=10.0), abs=0.15)


@pytest.mark.parametrize("plan", ["tp1x8", "tp2x4", "tp4x2"])
def test_short_prompts_share_steps(plan: str) -> None:
    """A step with a prompt of 30 to 200 tokens costs as much as one with 400: a busy instance never runs one alone."""
    load = TierLoad("code", 1800.0, 1.0, (30, 40, 60, 80, 100, 120, 160, 200), 10.0)
    assert QueueingModel(COST, TIERS, (load,)).predict(PLANS[plan]).attainment["code"] > 0.95
    assert simulated(PLANS[plan], (load,), seconds=2.0) > 0.95


@pytest.mark.parametrize("rate", [170.0, 220.0, 260.0, 350.0])
def test_a_decode_instance_that_is_too_full(rate: float) -> None:
    """It has room for 215 requests a second; those that waited for it have no time left to be slowed down."""
    load = TierLoad("code", rate, 1.0, (100, 150, 200, 250, 300, 350, 400, 450), 300.0)
    tiers = {"code": Tier("code", ttft_ms=2000, tpot_ms=9)}
    share = QueueingModel(COST, tiers, (load,)).predict(PLANS["split"]).attainment["code"]
    assert share == pytest.approx(simulated(PLANS["split"], (load,), tiers, seconds=8.0), abs=0.12)


@pytest.mark.parametrize(("chat", "code"), [(60, 160), (160, 60), (160, 200)])
def test_far_into_overload_the_plan_that_it_ranks_first_is_nearly_the_best(chat: float, code: float) -> None:
    best = max(PLANS, key=lambda plan: predicted(PLANS[plan], chat, code))
    truth = {plan: simulated(shapes, loads(chat, code), seconds=10.0) for plan, shapes in PLANS.items()}
    assert truth[best] >= 0.9 * max(truth.values()), (best, truth)


def test_without_a_decode_instance_that_is_fast_enough_nothing_of_the_tier_is_met() -> None:
    slow = (*(Shape(1, "prefill"),) * 7, Shape(1, "decode"))
    tight = {"chat": Tier("chat", 300, 5), "code": CODE}
    prediction = QueueingModel(COST, tight, loads(1, 1)).predict(slow)
    assert prediction.attainment["chat"] == 0
    assert prediction.attainment["code"] > 0.9
