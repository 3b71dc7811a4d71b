"""Cells behind a router, in the simulator."""

import math

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import Shape, homogeneous, place
from nitsum_jax.control.planning.decision import Decision, PlanInputs
from nitsum_jax.control.routing.routers import ROUTERS
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.sim.cluster.conversations import conversations, key_of
from nitsum_jax.sim.cluster.plans import ask_planner, dedicated, planned, shared
from nitsum_jax.sim.cluster.run import ClusterSetting, simulate_cluster
from nitsum_jax.sim.main import main
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload
from tests.control.profiles import roofline_profile

TIERS = TierSet((Tier("chat", 500, 25),))
COST = CostModel(roofline_profile())
TWO = ("round_robin", "ours")
TWO_TIERS = TierSet((Tier("chat", 500, 25), Tier("code", 5000, 100)))


def steady(rate: float, seconds: float = 10.0, prompt: int = 1500) -> Workload:
    count = int(rate * seconds)
    lengths = [prompt * (1 + n % 3) for n in range(count)]  # in rounds of three
    requests = tuple(TraceRequest(n / rate, lengths[n], 40, "chat") for n in range(count))
    return Workload(requests, "steady", seconds)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_request_is_served_once_whatever_the_router(name: str) -> None:
    outcome = simulate_cluster(steady(20), TIERS, COST, ClusterSetting(shared(3, homogeneous(1, 1))), ROUTERS[name](0))
    assert outcome.offered == 200
    assert outcome.attainment > 0.95
    assert 1 <= outcome.fullest <= 3


def test_two_runs_agree() -> None:
    setting = ClusterSetting(shared(3, homogeneous(1, 1)), report_s=1.0)
    runs = [simulate_cluster(steady(30), TIERS, COST, setting, ROUTERS["ours"](1)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_ours_finds_room_that_turns_do_not() -> None:
    # In turn, one cell of three gets all the longest prompts, more than it can compute in time.
    setting = ClusterSetting(shared(3, homogeneous(1, 1)), continued=0.0)
    workload = steady(20, prompt=2000)
    turns, ours = (simulate_cluster(workload, TIERS, COST, setting, ROUTERS[name](0)) for name in TWO)
    assert ours.attainment > turns.attainment + 0.05


def test_conversations_go_on_where_their_text_is() -> None:
    workload = steady(8, seconds=20, prompt=800)
    setting = ClusterSetting(shared(4, homogeneous(1, 1)), continued=0.8)
    turns, ours = (simulate_cluster(workload, TIERS, COST, setting, ROUTERS[name](0)) for name in TWO)
    assert ours.held_tokens > 1.5 * turns.held_tokens
    assert ours.attainment == 1


def test_a_conversation_contains_what_was_said_before() -> None:
    requests = steady(10).requests
    found = list(conversations(requests, 1.0, 0))
    assert any(len(prefixes) > 1 for prefixes in found)
    for number, prefixes in enumerate(found):
        sizes = [0, *(tokens for tokens, _ in prefixes)]
        assert sizes == sorted(set(sizes))
        assert sizes[-1] < requests[number].prompt_tokens
        earlier = {key_of(n): requests[n].prompt_tokens + requests[n].output_tokens for n in range(number)}
        assert all(earlier[key] == tokens for tokens, key in prefixes)
    assert not any(conversations(requests, 0.0, 0))


def test_dedicated_cells_take_one_tier_and_have_their_layout() -> None:
    requests = [TraceRequest(n / 20, 1000, 20, "code" if n % 4 else "chat") for n in range(100)]
    workload = Workload(tuple(requests), "mixed", 5.0)
    cells = dedicated(3, homogeneous(2, 1), {"chat": (2, homogeneous(2, 2))}, TWO_TIERS)
    assert cells.places(TWO_TIERS) == {"chat": (0, 1), "code": (2,)}
    assert [layout.unplaced for layout in cells.layouts] == ["tp2", "tp2", "tp1x2"]
    outcome = simulate_cluster(workload, TWO_TIERS, COST, ClusterSetting(cells), ROUTERS["ours"](0))
    assert outcome.offered == 100
    assert outcome.fullest == 75 / (100 / 3)  # all code requests in the one cell that is left


def test_cells_are_what_a_plan_of_all_devices_makes_of_them() -> None:
    shapes = (*[Shape(1, tiers=("chat",))] * 3, Shape(1), Shape(2, tiers=("code",)))
    plan = place(shapes, 6)
    inputs = PlanInputs(0.0, plan, 6, (), ())
    cells = planned(3, homogeneous(2, 1), 2, Decision(0.0, inputs, (), plan, False, ""))
    assert str(cells) == "code: 1 of tp2; chat: 1 of tp1x2; all tiers: 1 of tp1x2"
    assert cells.places(TWO_TIERS) == {"chat": (1, 2), "code": (0, 2)}
    alone = planned(
        3, homogeneous(2, 1), 2, Decision(0.0, inputs, (), place([Shape(1, tiers=("chat",))], 6), False, "")
    )
    assert alone.places(TWO_TIERS) == {"chat": (0, 1, 2), "code": (1, 2)}  # to which it gives nothing: as they were


def test_the_planner_is_told_of_all_requests_and_all_cells() -> None:
    requests = [TraceRequest(n / 40, 1000, 20, "code" if n % 4 else "chat") for n in range(400)]
    said = ask_planner(Workload(tuple(requests), "mixed", 10.0), TWO_TIERS, COST, 6, homogeneous(2, 1), 2)
    assert said.inputs.num_devices == 12
    assert said.inputs.plan.devices == tuple(range(12))
    assert {load.tier: round(load.rate) for load in said.inputs.loads} == {"chat": 10, "code": 30}
    assert all(shape.tp <= 2 for shape in said.choice.shapes)  # an instance is in one cell
    assert said.inputs.recent[-1].time_s == requests[-1].arrival_s


def test_the_tool_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--profile=llama-3.1-8b-h100", "--cells=2", "--devices=1", "--policy=tp1", "--seconds=5"]
    assert main(["nitsum-simulate", *flags, "--router=round_robin,ours"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["router", "---", "round_robin", "ours"]
    assert all(math.isfinite(float(row.split("|")[3])) for row in rows[2:])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--router=ours"], "--router needs --cells"),
        (["--cells=2", "--router=best"], "--router=best is not known"),
        (["--cells=2", "--capacity"], "--cells compares routers"),
        (["--cells=2", "--dedicate=chat"], "--dedicate=chat: give TIER:CELLS"),
        (["--cells=2", "--dedicate=chat:3"], "--dedicate takes 3 cells, and --cells=2"),
        (["--cells=2", "--dedicate=chat:1,chat:1"], "names tier chat twice"),
        (["--cells=2", "--dedicate=chat:2"], "leaves no cell for tier code"),
        (["--cells=2", "--dedicate=none:1"], "unknown tier 'none'"),
        (["--dedicate=chat:1"], "--dedicate needs --cells"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nitsum-simulate", "--profile=llama-3.1-8b-h100", *flags]) == 2
    assert says in capsys.readouterr().err


def test_the_tool_asks_the_planner(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--profile=llama-3.1-8b-h100", "--cells=2", "--devices=1", "--policy=tp1", "--seconds=5"]
    assert main(["nitsum-simulate", *flags, "--router=ours", "--dedicate=planner"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("all tiers: 2 of tp1 (stays:")  # so small a load needs nothing
    assert said[3].startswith("| ours |")
