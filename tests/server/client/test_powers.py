"""nitsum-generate: forms, tools, targets and scores, by flags and by the lines of a file."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.client.flags import read_options
from nitsum_jax.server.client.generate import main_async
from tests.server.grpc.test_powers import CITY, HERMES
from tests.server.harness import echo, held, running, says

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}]


def generate(capsys: pytest.CaptureFixture[str], script: Any, *flags: str, template: str = HERMES) -> tuple[str, Any]:
    """What is printed, and the last request to the engine."""

    async def scenario() -> Any:
        async with running(script, template=template) as run:
            assert await main_async(["nitsum-generate", f"--server={run.address}", *flags]) == 0
            return run.engine.requests[-1]

    request = asyncio.run(scenario())
    return capsys.readouterr().out, request


def sent(*flags: str) -> Any:
    return read_options(["nitsum-generate", *flags]).requests


@pytest.mark.parametrize(
    ("flags", "valid"),
    [
        (['--json_schema={"enum": ["a", "b"]}'], ('"a"', '"b"')),
        (["--regex=[ab]"], ("a", "b")),
        (["--choice=yes", "--choice=no"], ("yes", "no")),
        (['--grammar=start: "x" "y"'], ("xy",)),
    ],
)
def test_an_output_holds_the_form_of_the_flags(
    capsys: pytest.CaptureFixture[str], flags: list[str], valid: tuple[str, ...]
) -> None:
    assert generate(capsys, held, "--prompt=hi", *flags)[0].strip() in valid


def test_a_schema_is_read_from_a_file_and_a_line_wins_over_the_flags(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(CITY))
    lines: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"prompt": "b", "regex": "x"},
        {"prompt": "c", "json_schema": CITY, "ttft_ms": 7, "include_stop": True, "prompt_logprobs": 0},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    first, second, third = sent(f"--prompts_file={tmp_path}/p.jsonl", f"--json_schema=@{tmp_path}/schema.json")
    assert json.loads(first.form.json_schema) == json.loads(third.form.json_schema) == CITY
    assert second.form.regex == "x"
    assert (third.ttft_ms, third.include_stop, third.HasField("prompt_logprobs")) == (7, True, True)
    assert (first.HasField("ttft_ms"), first.include_stop, first.HasField("prompt_logprobs")) == (False,) * 3


def test_a_chat_calls_a_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    flags = ["--chat", "--prompt=hi", f"--tools=@{tmp_path}/tools.json"]
    out, _ = generate(capsys, held, *flags, "--tool_choice=weather", "--json")
    (call,) = json.loads(out)["tool_calls"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Bonn", "Rom")
    said = '<think>hm</think>See.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
    out, _ = generate(capsys, says(said), *flags)
    assert out == 'See.\nweather {"city": "Rom"}\n'
    out, _ = generate(capsys, says(said), *flags, "--json")
    assert (json.loads(out)["reasoning"], json.loads(out)["text"]) == ("hm", "See.")


def test_a_line_is_a_conversation_in_the_form_of_openai(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "text", "text": "there"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": turns, "template_variables": {"extra": "E"}}))
    out, _ = generate(capsys, echo, f"--prompts_file={tmp_path}/p.jsonl", "--json")
    assert json.loads(out)["text"] == "E<user>hi\nthere<assistant>None<tool>sun<assistant>"


def test_scores_stops_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    out, request = generate(
        capsys, says("one two"), "--prompt=abc", "--json", "--prompt_logprobs=1", "--stop=e t", "--include_stop",
        "--ttft_ms=250", "--tpot_ms=20.5",
    )  # fmt: skip
    answer = json.loads(out)
    assert (answer["text"], answer["stop"]) == ("one t", "e t")
    assert [len(one["top"]) for one in answer["prompt_logprobs"]] == [1, 1]
    assert (request.ttft_ms, request.tpot_ms) == (250, 20.5)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--regex=a", "--choice=b"], "regex, choice give several"),
        (["--json_schema=@/nowhere/x"], "--json_schema=@/nowhere/x cannot be read"),
        (["--tools=[]"], "tools is for chats"),
        (["--chat", "--tools={}"], "tools must be a list"),
        (["--chat", "--tools=["], "--tools is not JSON"),
        (["--chat", '--tools=[{"name": "f"}]'], "a tool must be like"),
    ],
)
def test_what_is_wrong_is_told(flags: list[str], what: str) -> None:
    with pytest.raises(InvalidInputError, match=what):
        sent("--prompt=hi", *flags)
