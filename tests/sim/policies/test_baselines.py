"""Baselines and searches: what they enumerate, that all of them run, and that searches find what is there."""

import itertools

import pytest

from nitsum_jax.control.plan import Shape
from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import Layout, Role
from nitsum_jax.sim.policies import baselines
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.policies.bound import candidates, upper_bound
from nitsum_jax.sim.policies.layouts import placements, role_splits, splits, tier_splits
from nitsum_jax.sim.policies.named import policies_named
from nitsum_jax.sim.policies.search import RateGrid, best_by_capacity, capacity, sample, tournament
from nitsum_jax.sim.runs.simulation import RunPolicy, simulate
from nitsum_jax.sim.runs.summary import Figures
from nitsum_jax.sim.workloads.workload import window
from tests.control.cells import COST as COST8
from tests.sim.small_run import DEVICES, MIXED, SPLIT, TIERS, cost_model, workload

COST = cost_model()
SETTING = Setting(COST, TIERS, DEVICES)
FAMILIES = baselines.families(SETTING)


@pytest.mark.parametrize("name", [*FAMILIES, *baselines.ablations(SETTING)])
def test_every_baseline_serves_everything(name: str) -> None:
    policies = list(policies_named(SETTING, name))
    assert len({policy.name for policy in policies}) == len(policies)
    work = workload(seconds=4.0)
    for policy in {policies[0].name: policies[0], policies[-1].name: policies[-1]}.values():
        outcome = simulate(work, TIERS, COST, policy, num_devices=DEVICES)
        assert len(outcome.finished) == len(work.requests)


def test_static_holds_every_cut_and_split() -> None:
    setting = Setting(COST8, TIERS, 8)
    plans = [policy.plan.unplaced for policy in baselines.best_static(setting)]
    assert len(set(plans)) == len(plans)
    for cut in ("tp8", "tp4x2", "tp4+tp2x2", "tp4+tp2+tp1x2", "tp1x8", "tp4:prefill+tp1x4:decode"):
        assert cut in plans
    assert "tp4/chat+tp4/batch" in plans
    assert {p for p in plans if p.startswith("tp4/batch") and "tp1x4/chat" in p}  # large instances for the relaxed tier


def test_splits_are_all_of_them() -> None:
    found = list(splits(8, (1, 2, 4, 8)))
    naive = [
        (a, count * a, b)
        for a, b in itertools.product((1, 2, 4, 8), repeat=2)
        for count in range(1, 8)
        if count * a < 8 and (8 - count * a) % b == 0
    ]
    assert sorted(found) == sorted(naive)
    assert len(list(role_splits(8, (1, 2, 4, 8)))) == len(naive)
    assert len(list(tier_splits(8, (1, 2, 4, 8), TIERS))) == len(naive)


def test_placements_begin_with_none_and_repeat_nothing() -> None:
    found = list(placements((4, 2, 2), TIERS))
    assert found[0] == (Shape(4), Shape(2), Shape(2))
    keys = [tuple(sorted(map(str, shapes))) for shapes in found]
    assert len(set(keys)) == len(keys)


def test_larger_cells_repeat_the_node() -> None:
    setting = Setting(COST8, TIERS, 32)
    (policy,) = baselines.static_tp(setting, 4)
    assert len(policy.plan.instances) == 8
    assert {device for i in policy.plan.instances for device in i.devices} == set(range(32))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("tp4+tp2x2", (Shape(4), Shape(2), Shape(2))),
        ("tp2:prefill+tp1x2:decode", (Shape(2, "prefill"), Shape(1, "decode"), Shape(1, "decode"))),
        ("tp2x2/chat,batch+tp4", (Shape(4), *[Shape(2, tiers=("chat", "batch"))] * 2)),
        ("tp4@4,5,6,7+tp2@2,3+tp2@0,1", (Shape(4), Shape(2), Shape(2))),
        ("TP4+tp2x2/chat:mixed", None),
        ("tp2x4/gold", None),
        ("tp8:prefill", None),
        ("tp8x2", None),
    ],
)
def test_a_policy_may_be_a_layout_as_servers_read_it(text: str, shapes: tuple[Shape, ...] | None) -> None:
    if shapes is None:
        with pytest.raises(NitsumError):
            policies_named(Setting(COST8, TIERS, 8), text)
    else:
        (policy,) = policies_named(Setting(COST8, TIERS, 8), text)
        assert sorted(policy.plan.shapes, key=str) == sorted(shapes, key=str)


def _stand_in(limits: dict[str, float], grid: RateGrid):  # type: ignore[no-untyped-def]
    """Figures without a simulation: attainment falls along a line that crosses 90 % at a policy's limit."""
    calls: list[tuple[str, int]] = []

    def evaluate(policy: RunPolicy, level: int) -> Figures:
        calls.append((policy.name, level))
        attained = min(1.0, max(0.0, 0.9 + 0.5 * (1 - grid.factor(level) / limits[policy.name])))
        return Figures(policy.name, 10_000, round(10_000 * attained), 1.0, {}, [], 0.0)

    return evaluate, calls


@pytest.mark.parametrize("limit", [0.2, 0.77, 1.0, 1.9, 30.0])
@pytest.mark.parametrize("guess", [-6, 0, 9])
def test_capacity_finds_the_limit(limit: float, guess: int) -> None:
    grid = RateGrid(1.1)
    evaluate, calls = _stand_in({"p": limit}, grid)
    found = capacity(RunPolicy("p", MIXED), guess, evaluate, grid, lowest=-40)
    assert found.factor == pytest.approx(limit, rel=0.01)
    assert grid.factor(found.below) <= limit * 1.0001 < grid.factor(found.below + 1) * 1.001
    assert len(calls) < 30


def test_out_of_reach_is_said_to_be() -> None:
    grid = RateGrid(1.1)
    evaluate, _ = _stand_in({"p": 1e-9}, grid)
    assert capacity(RunPolicy("p", MIXED), 0, evaluate, grid, lowest=-10).factor == 0.0


@pytest.mark.parametrize("start", [-12, 0, 12])
def test_tournaments_keep_the_best(start: int) -> None:
    grid = RateGrid(1.1)
    limits = {f"p{i}": 0.5 + 0.05 * i for i in range(40)}
    evaluate, calls = _stand_in(limits, grid)
    policies = [RunPolicy(name, MIXED) for name in limits]
    top = tournament(policies, start, evaluate, keep=3)
    assert top[0].name == "p39"
    best, found = best_by_capacity(top, 0, evaluate, grid, lowest=-40)
    assert best.name == "p39"
    assert found.factor == pytest.approx(limits["p39"], rel=0.01)
    assert len(calls) < 40 * 12


def test_samples_are_windows_of_the_whole() -> None:
    work = workload(seconds=40.0)
    part = sample(work, 10.0)
    assert part.seconds == pytest.approx(10.0)
    assert len(part.requests) == pytest.approx(len(work.requests) / 4, rel=0.35)
    lengths = [(r.prompt_tokens, r.output_tokens) for r in work.requests]
    assert all((r.prompt_tokens, r.output_tokens) in lengths for r in part.requests)
    assert sample(work, 100.0) is work


def test_the_bound_is_the_union_of_what_candidates_meet() -> None:
    work = workload(rate=30.0, seconds=20.0, prompt=3000, output=150)
    chosen = candidates(SETTING, [MIXED])
    assert len(chosen) == len({policy.plan.unplaced for policy in chosen})
    # One window: the runs of the bound are runs of the whole workload.
    found = upper_bound(SETTING, work, chosen, window_s=20.0)
    runs = [simulate(work, TIERS, COST, policy, num_devices=DEVICES) for policy in chosen]
    met = [{job.id for job in outcome.finished if job.met()} for outcome in runs]
    assert max(map(len, met)) < len(work.requests)  # else the union says nothing
    assert found.met == len(set.union(*met))
    assert found.best_met == max(map(len, met))
    assert found.offered == len(work.requests)


@pytest.mark.parametrize(("lead_s", "tail_s"), [(0.0, 0.0), (3.0, 2.0)])
def test_no_choice_of_layouts_by_window_lies_above_the_bound(lead_s: float, tail_s: float) -> None:
    work = workload(rate=30.0, seconds=20.0, prompt=3000, output=150)
    chosen = candidates(SETTING, [SPLIT])
    found = upper_bound(SETTING, work, chosen, window_s=5.0, lead_s=lead_s, tail_s=tail_s)
    assert len(found.choices) == 4
    assert found.best_met <= found.met <= found.offered == len(work.requests)
    # The best choice of one candidate a window, counted once more.
    best = 0
    for i in range(4):
        start = max(0.0, 5.0 * i - lead_s)
        piece = window(work, start, 5.0 * i + 5.0 + tail_s - start)
        counts = []
        for policy in chosen:
            outcome = simulate(piece, TIERS, COST, policy, num_devices=DEVICES)
            inside = [job for job in outcome.finished if 5.0 * i <= job.arrival_s + start < 5.0 * i + 5.0]
            counts.append(sum(job.met() for job in inside))
        best += max(counts)
    assert best == found.best_met


def test_dynamo_has_a_tp_for_each_role() -> None:
    setting = Setting(COST8, TIERS, 8)
    pairs = set()
    for policy in baselines.dynamo(setting):
        prefill = {i.tp for i in policy.plan.instances if i.role == "prefill"}
        decode = {i.tp for i in policy.plan.instances if i.role == "decode"}
        assert len(prefill) == len(decode) == 1
        assert sum(i.tp for i in policy.plan.instances) == 8
        pairs.add((*prefill, *decode))
    assert pairs == set(itertools.product((1, 2, 4), repeat=2))  # with TP 8 a node has one role only


@pytest.mark.parametrize(
    ("tps", "rate", "prompt", "output"),
    [((1, 2), 60.0, 3000, 10), ((2, 1), 150.0, 100, 500), ((1, 1), 60.0, 3000, 10), ((2, 2), 150.0, 100, 500)],
)
def test_devices_change_their_role_and_take_its_tp(
    tps: tuple[int, int], rate: float, prompt: float, output: float
) -> None:
    setting = Setting(COST8, TIERS, 8)
    work = workload(rate=rate, seconds=20.0, prompt=prompt, output=output)
    moved = 0
    for policy in baselines.dynamo(setting):
        roles = {i.role: i.tp for i in policy.plan.instances}
        if (roles[Role.PREFILL], roles[Role.DECODE]) != tps:
            continue
        outcome = simulate(work, TIERS, COST8, policy, num_devices=8)
        assert len(outcome.finished) + len(outcome.failed) == len(work.requests)
        for report in outcome.switches:
            moved += 1
            assert {(i.role, i.tp) for i in report.after.instances} == {("prefill", tps[0]), ("decode", tps[1])}
            assert sorted(d for i in report.after.instances for d in i.devices) == list(range(8))
    assert moved


def test_adaptive_control_keeps_to_what_is_allowed() -> None:
    work = workload(rate=30.0, seconds=30.0)
    for policy in baselines.ablations(SETTING)["homogeneous"]:
        outcome = simulate(work, TIERS, COST, policy, num_devices=DEVICES)
        plans: list[Layout] = [report.after for report in outcome.switches]
        for plan in plans:
            assert len({(i.tp, i.role) for i in plan.instances}) == 1
