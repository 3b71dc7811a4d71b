"""Plans of many nodes: as good as trying all of them, quick, repeatable, and careful about change."""

import collections
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import Shape, homogeneous, shapes_text
from nitsum_jax.control.planning.decision import PlanInputs, PlannerConfig
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.fleet.nodes import changed_devices
from nitsum_jax.control.planning.fleet.search import miniature
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.planning.queueing import QueueingModel
from nitsum_jax.control.planning.rollout import Arrival
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout
from tests.control.profiles import roofline_profile

CHAT, CODE = Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100)
BATCH = Tier("batch", ttft_ms=60_000, tpot_ms=500, weight=0.5)
PROMPTS = (100, 300, 500, 800, 1000, 1200, 1500, 2500)
SMALL = CostModel(roofline_profile((1, 2, 4), devices=4))  # nodes of four
LARGE = CostModel(roofline_profile())


def inputs(devices: int, plan: Layout | None = None, lost: tuple[int, ...] = (), **rates: float) -> PlanInputs:
    """A load in requests a second for each device."""
    outputs = {"chat": 200.0, "code": 30.0, "batch": 300.0}
    loads = tuple(TierLoad(name, rate * devices, 1.3, PROMPTS, outputs[name]) for name, rate in rates.items())
    return PlanInputs(10.0, plan or homogeneous(devices, 2), devices, lost, loads)


def devices_of(plan: Layout) -> list[int]:
    return sorted(device for instance in plan.instances for device in instance.devices)


def every_plan(devices: int, tps: tuple[int, ...], tiers: tuple[str, ...]) -> Iterator[tuple[Shape, ...]]:
    """All multisets of mixed instances, with every set of tiers that are neighbours; and all splits of one TP each."""
    runs = [(), *((tier,) for tier in tiers)]
    shapes = [Shape(tp, tiers=run) for tp in reversed(tps) for run in runs]

    def fill(left: int, start: int) -> Iterator[tuple[Shape, ...]]:
        if not left:
            yield ()
        for i in range(start, len(shapes)):
            if shapes[i].tp <= left:
                for rest in fill(left - shapes[i].tp, i):
                    yield (shapes[i], *rest)

    yield from fill(devices, 0)
    for prefill, decode in itertools.product(tps, repeat=2):
        for count in range(1, devices // prefill):
            rest = devices - count * prefill
            if rest and rest % decode == 0:
                yield (Shape(prefill, "prefill"),) * count + (Shape(decode, "decode"),) * (rest // decode)


@functools.cache
def _model(planner: Planner, loads: tuple[TierLoad, ...]) -> QueueingModel:
    return QueueingModel(planner.cost, planner.tiers, loads, resident_tp=planner.resident_tp)


def score(planner: Planner, loads: tuple[TierLoad, ...], shapes: tuple[Shape, ...]) -> float:
    """What the planner maximises, written down once more."""
    model, config = _model(planner, loads), planner.config
    now = model.predict(shapes).goodput / model.offered
    more = model.predict(shapes, config.headroom).goodput / model.offered / config.headroom
    return (1 - config.headroom_weight) * now + config.headroom_weight * more


@pytest.mark.parametrize(("chat", "code"), [(2.0, 1.0), (4.0, 0.5), (0.5, 6.0), (3.0, 5.0), (6.0, 6.0)])
def test_it_is_as_good_as_trying_all_plans(chat: float, code: float) -> None:
    planner = Planner(SMALL, (CHAT, CODE), PlannerConfig(hysteresis=0.0))
    given = inputs(8, chat=chat, code=code)  # two nodes of four
    found = planner.decide(given)
    best = max(score(planner, given.loads, shapes) for shapes in every_plan(8, (1, 2, 4), ("chat", "code")))
    assert score(planner, given.loads, found.choice.shapes) >= best - 0.005


@pytest.mark.parametrize("devices", [64, 512])
def test_whole_nodes_are_planned_anew(devices: int) -> None:
    """How long that takes is measured by benchmarks/control/fleet.py."""
    planner = Planner(LARGE, (CHAT, CODE, BATCH))
    given = inputs(devices, homogeneous(devices, 1), chat=2.0, code=1.0, batch=0.5)
    decision = planner.decide(given)
    assert decision.switch
    assert devices_of(decision.choice) == list(range(devices))
    assert all(i.devices[0] // 8 == i.devices[-1] // 8 for i in decision.choice.instances)
    present, best, *_ = decision.candidates
    assert best.score > present.score + 0.1


def test_a_plan_that_does_stays() -> None:
    planner = Planner(LARGE, (CHAT, CODE))
    first = planner.decide(inputs(64, homogeneous(64, 1), chat=2.0, code=1.0))
    again = planner.decide(inputs(64, first.choice, chat=2.0, code=1.0))
    assert not again.switch
    assert again.reason.startswith("stays")


def test_a_little_more_of_a_tier_changes_a_few_nodes() -> None:
    planner = Planner(LARGE, (CHAT, CODE))
    first = planner.decide(inputs(128, homogeneous(128, 1), chat=2.0, code=2.0))
    then = planner.decide(inputs(128, first.choice, chat=2.6, code=1.8))
    assert changed_devices(first.choice, then.choice) <= 64


def test_decisions_can_be_made_again() -> None:
    given = inputs(64, homogeneous(64, 1), chat=3.0, code=1.0)
    first = Planner(LARGE, (CHAT, CODE)).decide(given)
    logged = json.loads(json.dumps(given.to_json()))
    assert Planner(LARGE, (CHAT, CODE)).decide(PlanInputs.from_json(logged)) == first


def test_lost_devices_and_smaller_last_nodes() -> None:
    planner = Planner(LARGE, (CHAT, CODE))
    plan = Layout(tuple(i for i in homogeneous(28, 4).instances if not {3, 17} & set(i.devices)))
    decision = planner.decide(inputs(28, plan, (3, 17), chat=2.0, code=2.0))
    used = devices_of(decision.choice)
    assert not {3, 17} & set(used)
    assert len(used) == 26
    dead = planner.decide(inputs(64, homogeneous(64, 8), (9,), chat=0.1, code=0.1))
    assert 9 not in devices_of(dead.choice)  # an instance that is gone is replaced, gain or no gain


def test_only_allowed_layouts_are_chosen() -> None:
    planner = Planner(LARGE, (CHAT, CODE))
    texts = (shapes_text([Shape(1)] * 64), shapes_text([Shape(4)] * 8 + [Shape(2)] * 16))
    given = dataclasses.replace(inputs(64, homogeneous(64, 1), chat=2.0, code=1.0), allowed=texts)
    decision = planner.decide(given)
    assert shapes_text([Shape(shape.tp) for shape in decision.choice.shapes]) == texts[1]


def test_without_requests_nothing_changes() -> None:
    assert not Planner(LARGE, (CHAT, CODE)).decide(inputs(64, chat=0.0, code=0.0)).switch


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({Shape(4): 8, Shape(1): 32}, {Shape(4): 2, Shape(1): 8}),
        ({Shape(8): 63, Shape(2): 4}, {Shape(8): 2}),
        ({Shape(4, "decode"): 2, Shape(1, "prefill"): 120}, {Shape(4, "decode"): 1, Shape(1, "prefill"): 12}),
    ],
)
def test_a_miniature_has_the_proportions_of_the_cell(counts: dict[Shape, int], expected: dict[Shape, int]) -> None:
    found = miniature(list(counts.items()), 16)
    assert collections.Counter(found) == collections.Counter(expected)


def test_the_last_requests_have_a_say() -> None:
    """Where the estimate sees no difference, what the miniature says decides."""
    given = inputs(64, homogeneous(64, 1), chat=2.0, code=1.0)
    recent = tuple(Arrival(i / 48, "chat" if i % 3 else "code", PROMPTS[i % 8], 100) for i in range(96))
    decision = Planner(LARGE, (CHAT, CODE)).decide(dataclasses.replace(given, recent=recent))
    assert decision.switch
    present, best, *_ = decision.candidates
    assert present.replayed is not None
    assert best.replayed is not None
    assert best.replayed > present.replayed
    again = Planner(LARGE, (CHAT, CODE)).decide(PlanInputs.from_json(json.loads(json.dumps(decision.inputs.to_json()))))
    assert again == decision
