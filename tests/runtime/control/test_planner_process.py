"""The planner in its own process: the same decisions as here, and nothing hangs when it fails."""

import io
import json
from collections.abc import Iterator

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.decision import PlanInputs, PlannerConfig
from nitsum_jax.control.planning.estimate import TierLoad
from nitsum_jax.control.planning.planner import Planner
from nitsum_jax.control.tiers import Tier
from nitsum_jax.runtime.control.planner_process import PlannerError, PlannerProcess, serve
from tests.control.profiles import roofline_profile

PROFILE = roofline_profile()
TIERS = (Tier("chat", ttft_ms=300, tpot_ms=7), Tier("code", ttft_ms=2000, tpot_ms=100))
PROMPTS = (100, 300, 500, 800, 1000, 1200, 1500, 2500)
INPUTS = PlanInputs(
    10.0,
    homogeneous(8, 1),
    8,
    (),
    (TierLoad("chat", 20.0, 1.0, PROMPTS, 200.0), TierLoad("code", 5.0, 1.0, PROMPTS, 30.0)),
)


@pytest.fixture
def process() -> Iterator[PlannerProcess]:
    process = PlannerProcess(PROFILE, TIERS, PlannerConfig(), timeout_s=60)
    yield process
    process.close()


def test_it_decides_as_a_planner_in_this_process_would(process: PlannerProcess) -> None:
    here = Planner(CostModel(PROFILE), TIERS).decide(INPUTS)
    assert here.switch
    assert process.decide(INPUTS) == here


def test_after_its_death_it_is_started_again(process: PlannerProcess) -> None:
    first = process.decide(INPUTS)
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert process.decide(INPUTS) == first


def test_no_answer_in_time_is_an_error_and_not_a_hang() -> None:
    impatient = PlannerProcess(PROFILE, TIERS, PlannerConfig(), timeout_s=0.01)
    try:
        with pytest.raises(PlannerError):
            impatient.decide(INPUTS)
    finally:
        impatient.close()


def test_an_error_in_one_decision_leaves_the_next_ones() -> None:
    hello = PlannerProcess(PROFILE, TIERS, PlannerConfig())._hello
    wrong = INPUTS.to_json() | {"loads": [{"tier": "nobody"}]}
    lines = [hello, {"inputs": wrong, "ratios": {}}, {"inputs": INPUTS.to_json(), "ratios": {"1": [1.0, 1.0]}}]
    sink = io.StringIO()
    serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), sink)
    first, second = (json.loads(line) for line in sink.getvalue().splitlines())
    assert "KeyError" in first["error"]
    assert second["decision"]["switch"]


def test_measured_step_times_change_what_it_decides() -> None:
    hello = PlannerProcess(PROFILE, TIERS, PlannerConfig())._hello
    # Everything takes ten times as long: no TP holds the tight tier's time per token any more.
    slow = {str(tp): [10.0, 10.0] for tp in (1, 2, 4, 8)}
    lines = [hello, {"inputs": INPUTS.to_json(), "ratios": slow}]
    sink = io.StringIO()
    serve(io.StringIO("".join(json.dumps(line) + "\n" for line in lines)), sink)
    decision = json.loads(sink.getvalue())["decision"]
    assert max(candidate["attainment"].get("chat", 0.0) for candidate in decision["candidates"]) == 0
