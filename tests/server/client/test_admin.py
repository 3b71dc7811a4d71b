"""nitsum-admin against a server with a real control loop over a fake cell of devices."""

import asyncio
import json

import grpc.aio
import pytest

from nitsum_jax.control.planning.decision import Candidate, Decision, PlanInputs
from nitsum_jax.server.client.admin import main_async
from nitsum_jax.server.client.explanation import explanation_text
from tests.server.harness import echo, running


def _say(argv: list[str], address: str) -> "asyncio.Future[int]":
    return asyncio.ensure_future(main_async(["nitsum-admin", *argv, f"--server={address}"]))


def test_layouts_are_forced_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with running(echo) as server:
            before = str(server.engine.layout())
            assert await _say(["force", "tp4"], server.address) == 0
            assert str(server.engine.layout()) == "tp4" != before
            assert await _say(["force", "tp2x2", "--json"], server.address) == 0
            assert await _say(["explain"], server.address) == 2  # a server without a controller
            assert await _say(["pause"], server.address) == 2
            assert await _say(["force", "tp3"], server.address) == 2

    asyncio.run(scenario())
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert "-> tp4:" in first
    assert json.loads(second)["to_layout"] == "tp2x2"
    lines = err.splitlines()
    assert len(lines) == 3
    assert "this server has no controller" in lines[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "give one of explain"),
        (["sing"], "give one of explain"),
        (["force"], "takes one value"),
        (["pause", "now"], "takes no value"),
        (["lose", "x"], "give a number"),
    ],
)
def test_wrong_commands(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncio.run(main_async(["nitsum-admin", *argv])) == 2
    assert words in capsys.readouterr().err


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert asyncio.run(main_async(["nitsum-admin", "explain", "--server=127.0.0.1:1"])) == 3
    assert "no server answers at 127.0.0.1:1" in capsys.readouterr().err
    assert grpc.StatusCode.UNAVAILABLE


def test_a_decision_is_told_with_what_it_was_made_from() -> None:
    from nitsum_jax.control.plan import Shape, place
    from nitsum_jax.control.planning.estimate import TierLoad

    plan = place([Shape(2)] * 2, 4)
    inputs = PlanInputs.from_json(
        {
            "time_s": 7.0,
            "plan": {"instances": []},
            "num_devices": 4,
            "lost": [],
            "loads": [{"tier": "chat", "rate": 2.5, "dispersion": 1.0, "prompts": [100, 300], "output": 40.0}],
            "recent": [],
            "allowed": [],
        }
    )
    assert isinstance(inputs.loads[0], TierLoad)
    found = Decision(7.0, inputs, (Candidate("tp2x2", 2.4, 0.9, 0.5, {"chat": 0.96}),), plan, True, "it is better")
    state = {"mode": "on", "paused": True, "failures": 1, "applied": True, "plan_ms": 31.0}
    text = explanation_text(state | {"decision": found.to_json() | {"choice_text": plan.unplaced}})
    assert "planner on, paused; 1 decisions failed" in text
    assert "at 7.0 s, in 31 ms: tp2x2 (carried out)" in text
    assert "chat: 2.50 requests/s, prompts of 200 tokens, outputs of 40" in text
    assert "because it is better" in text
    assert "chat 96%" in text
    assert explanation_text(state | {"decision": None}).endswith("no decision so far")
