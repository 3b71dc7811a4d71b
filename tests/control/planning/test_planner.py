"""Decisions: what they depend on, when a switch is made, and that they can be made again from a log."""

import dataclasses
import json

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.planning.decision import Decision, PlanInputs, PlannerConfig
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.planner import Planner, least_tp
from nitsum_jax.control.planning.rollout import Arrival
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout
from tests.control.profiles import roofline_profile

COST = CostModel(roofline_profile())
TIERS = (Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100))


def inputs(chat: float, code: float, plan: Layout | None = None, lost: tuple[int, ...] = ()) -> PlanInputs:
    prompts = (100, 300, 500, 800, 1000, 1200, 1500, 2500)
    loads = (TierLoad("chat", chat, 1.0, prompts, 200.0), TierLoad("code", code, 1.0, prompts, 30.0))
    count = 48
    share = chat / (chat + code) if chat + code else 0.0
    recent = tuple(
        Arrival(i / max(chat + code, 1e-9), "chat" if (i * share) % 1 + share >= 1 else "code", prompts[i % 8], 60)
        for i in range(count if chat + code else 0)
    )
    return PlanInputs(10.0, plan or homogeneous(8, 2), 8, lost, loads, recent)


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(COST, TIERS)


def devices_of(decision: Decision) -> list[int]:
    return sorted(device for instance in decision.choice.instances for device in instance.devices)


def test_without_requests_nothing_changes(planner: Planner) -> None:
    decision = planner.decide(inputs(0, 0))
    assert not decision.switch
    assert decision.choice == homogeneous(8, 2)


def test_a_plan_that_serves_all_stays(planner: Planner) -> None:
    decision = planner.decide(inputs(0.5, 0.5, homogeneous(8, 4)))
    assert not decision.switch
    assert decision.reason.startswith("stays")


def test_only_a_plan_that_does_not_serve_all_is_compared(planner: Planner) -> None:
    assert len(planner.decide(inputs(0.5, 0.5, homogeneous(8, 4))).candidates) == 1
    compared = planner.decide(inputs(20, 5, homogeneous(8, 1)))
    assert len(compared.candidates) == 1 + planner.config.finalists
    kinds = {("prefill" in c.plan, "tp1x8" in c.plan) for c in compared.candidates}
    assert len(kinds) > 1


def test_a_thrifty_decision_looks_closer_only_for_a_clear_gain(planner: Planner) -> None:
    calm = planner.decide(dataclasses.replace(inputs(0.5, 0.5), thrifty=True))
    assert (calm.switch, calm.work) == (False, 0)  # no plan can be far better than one that serves all
    crowded = inputs(140, 40, homogeneous(8, 2))  # no plan serves all of these
    full = planner.decide(crowded)
    thrifty = planner.decide(dataclasses.replace(crowded, thrifty=True))
    assert thrifty.candidates[0].score < 0.9
    assert all(candidate.replayed is None for candidate in thrifty.candidates)
    assert not thrifty.switch
    assert thrifty.work < full.work
    wrong = inputs(20, 5, homogeneous(8, 1))
    clear = planner.decide(dataclasses.replace(wrong, thrifty=True))
    assert dataclasses.replace(clear, inputs=wrong) == planner.decide(wrong)
    assert PlanInputs.from_json(json.loads(json.dumps(clear.inputs.to_json()))).thrifty


def test_requests_that_wait_count(planner: Planner) -> None:
    calm = inputs(4, 1, homogeneous(8, 8))
    assert planner.decide(calm).candidates[0].replayed == 1.0
    queue = tuple(Arrival(9.9, "chat", 2500, 60) for _ in range(200))
    crowded = planner.decide(dataclasses.replace(calm, waiting=queue))
    assert crowded.candidates[0].replayed is not None
    assert crowded.candidates[0].replayed < 0.7
    assert PlanInputs.from_json(json.loads(json.dumps(crowded.inputs.to_json()))) == crowded.inputs


def test_a_plan_that_is_too_slow_for_the_tight_tier_is_left(planner: Planner) -> None:
    decision = planner.decide(inputs(20, 5, homogeneous(8, 1)))
    assert decision.switch
    assert max(instance.tp for instance in decision.choice.instances) > 1
    assert devices_of(decision) == list(range(8))
    present, *others = decision.candidates
    assert present.plan == "tp1x8"
    assert max(other.score for other in others) > present.score


def test_a_decision_can_be_made_again_from_its_log(planner: Planner) -> None:
    first = planner.decide(inputs(20, 5, homogeneous(8, 1)))
    logged = json.loads(json.dumps(first.inputs.to_json()))
    again = Planner(COST, TIERS).decide(PlanInputs.from_json(logged))
    assert again == first


def test_lost_devices_are_left_out(planner: Planner) -> None:
    plan = place([Shape(4), Shape(1), Shape(1)], 8, lost=(3, 6))
    assert plan.instances[0].devices == (0, 1, 2, 7)  # no run of four is left, but four with different ranks are
    decision = planner.decide(inputs(20, 5, plan, lost=(3, 6)))
    assert not {3, 6} & set(devices_of(decision))
    assert decision.candidates


def test_only_allowed_layouts_are_chosen(planner: Planner) -> None:
    allowed = dataclasses.replace(inputs(20, 5, homogeneous(8, 1)), allowed=("tp1x8", "tp2x4"))
    decision = planner.decide(allowed)
    assert {instance.tp for instance in decision.choice.instances} == {2}


@pytest.mark.parametrize(
    "text", ["tp1x4:prefill+tp4:decode", "tp4:decode/chat+tp1x4:prefill", "tp4@4,5,6,7:decode+tp1x4:prefill"]
)
def test_an_allowed_layout_may_be_written_in_any_order(planner: Planner, text: str) -> None:
    allowed = dataclasses.replace(inputs(20, 5, homogeneous(8, 1)), allowed=(text,))
    shapes = planner.decide(allowed).choice.shapes
    assert sorted((shape.tp, shape.role) for shape in shapes) == [(1, "prefill")] * 4 + [(4, "decode")]


def test_hysteresis_keeps_a_plan_that_is_nearly_as_good() -> None:
    stubborn = Planner(COST, TIERS, PlannerConfig(hysteresis=1.0))
    assert not stubborn.decide(inputs(20, 5, homogeneous(8, 1))).switch


def test_a_replay_that_ends_before_the_queue_is_full_does_not_outvote_the_estimate() -> None:
    """240 requests/s and 48 of them replayed: in 0.2 s no plan shows what it does to requests that may wait for 2 s."""
    short = Planner(COST, TIERS, PlannerConfig(replayed=48))
    whole = Planner(COST, TIERS, PlannerConfig(replayed=49))  # as if these were all that came
    apart = place([*[Shape(1, "prefill")] * 4, Shape(4, "decode")], 8)
    crowded = inputs(120, 120, apart)
    present, *others = short.decide(crowded).candidates
    best = max(others, key=lambda other: other.score)
    assert best.score > present.score + 0.1
    assert present.replayed is not None
    assert best.replayed is not None
    assert best.replayed < present.replayed + 0.03
    assert not whole.decide(crowded).switch
    assert short.decide(crowded).switch


def test_a_patient_tier_that_sends_nothing_makes_no_replay_too_short() -> None:
    """As the `batch` tier of a server that had one such request an hour ago."""
    planner = Planner(COST, (*TIERS, Tier("batch", ttft_ms=60_000, tpot_ms=1000)), PlannerConfig(replayed=48))
    asked = inputs(4, 18, homogeneous(8, 1))  # 48 of them take longer than the 2 s that code waits
    silent = dataclasses.replace(asked, loads=(*asked.loads, TierLoad("batch", 0.0, 1.0, (500,), 30.0)))
    assert planner.decide(silent).reason == planner.decide(asked).reason


def test_the_least_tp_leaves_room_for_the_kv_cache() -> None:
    # 16 GB of weights on 80 GB: TP 1 does.  A model of five times the size does not leave a quarter at TP 1.
    assert least_tp(COST, PlannerConfig()) == 1
    large = dataclasses.replace(roofline_profile(), weight_bytes=int(65e9))
    short = {
        tp: dataclasses.replace(times, kv_capacity_tokens=int((72e9 * tp - 65e9) / 131_072))
        for tp, times in large.tps.items()
    }
    assert least_tp(CostModel(dataclasses.replace(large, tps=short)), PlannerConfig()) == 2
