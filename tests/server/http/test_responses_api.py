"""OpenAI's Responses API with the official client."""

import asyncio
import json
from typing import Any

import pytest
from pydantic import BaseModel

from tests.server.harness import TOKENIZER, echo, held, says
from tests.server.http.harness import serving, the_error
from tests.server.http.test_tools import HERMES, SAID, THINKS, WEATHER

RESPONSES = "/v1/responses"
TOOL: Any = {"type": "function", **WEATHER["function"], "strict": True}


class Pet(BaseModel):
    name: str
    legs: int


def test_texts_and_conversations() -> None:
    async def scenario() -> None:
        async with serving(echo) as run, run.openai() as client:
            answer = await client.responses.create(model="fake", input="hi", instructions="be brief")
            prompt = "<system>be brief<user>hi<assistant>"
            assert answer.output_text == prompt
            assert (answer.status, answer.to_dict()["store"], answer.error) == ("completed", False, None)
            assert answer.usage is not None
            assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), len(prompt))
            turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}, *answer.output]
            again = await client.responses.create(model="fake", input=[*turns, {"role": "user", "content": "ok"}])
            assert again.output_text == f"<user>hi<assistant>{prompt}<user>ok<assistant>"
            cut = await client.responses.create(model="fake", input="hi", max_output_tokens=3)
            assert (cut.status, cut.output_text) == ("incomplete", "<us")
            assert cut.incomplete_details is not None
            assert cut.incomplete_details.reason == "max_output_tokens"

    asyncio.run(scenario())


def test_events() -> None:
    async def scenario() -> None:
        async with serving(says("<think>hm</think>añ🙂b"), template=THINKS) as run, run.openai() as client:
            async with client.responses.stream(model="fake", input="hi") as stream:
                events = [event async for event in stream]
                final = await stream.get_final_response()
            assert final.output_text == "añ🙂b"
            assert [item.type for item in final.output] == ["reasoning", "message"]
            kinds = [event.type for event in events]
            assert kinds[:2] == ["response.created", "response.in_progress"]
            assert kinds[-1] == "response.completed"
            numbers = [event.sequence_number for event in events]
            assert numbers == sorted(set(numbers))
            deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
            assert "".join(deltas) == "añ🙂b"

    asyncio.run(scenario())


def test_tools() -> None:
    async def scenario() -> None:
        async with serving(says(SAID), template=HERMES) as run, run.openai() as client:
            answer = await client.responses.create(model="fake", input="weather?", tools=[TOOL])
            text, call = answer.output
            assert (text.type, answer.output_text) == ("message", "Let me see.")
            assert call.type == "function_call"
            assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Bonn", "days": 2})
            result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
            turns: Any = [{"role": "user", "content": "weather?"}, *answer.output, result]
            await client.responses.create(model="fake", input=turns)
            assert TOKENIZER.decode(run.engine.requests[-1].prompt_ids).endswith("<tool>rain<assistant>")
            async with client.responses.stream(model="fake", input="weather?", tools=[TOOL]) as stream:
                events = [event async for event in stream]
            pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
            assert json.loads("".join(pieces)) == {"city": "Bonn", "days": 2}
        async with serving(held, template=HERMES) as run, run.openai() as client:
            for choice in ("required", {"type": "function", "name": "weather"}):
                forced: Any = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False}
                (call,) = (await client.responses.create(model="fake", input="x", **forced)).output
                assert call.type == "function_call"
                assert json.loads(call.arguments).keys() == {"city", "days"}

    asyncio.run(scenario())


def test_formats() -> None:
    async def scenario() -> None:
        async with serving(held) as run, run.openai() as client:
            answer = await client.responses.parse(model="fake", input="a pet", text_format=Pet)
            assert isinstance(answer.output_parsed, Pet)
            plain: Any = {"format": {"type": "json_object"}}
            answer_text = (await client.responses.create(model="fake", input="a pet", text=plain)).output_text
            assert answer_text.startswith("{")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "param", "says_what"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"store": True}, "store", "keeps no responses"),
        ({"background": True}, "background", "not supported"),
        ({"input": []}, "input", "give a string"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "'input_image'"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"temperature": -1}, "temperature", "at least 0"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "thing"}}}}, "text", "Invalid type"),
        ({"nonsense": 1}, "nonsense", "Unrecognized"),
        ({"input": "x" * 3000}, None, "give under"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(fields: dict[str, Any], param: str | None, says_what: str) -> None:
    async def scenario() -> None:
        async with serving() as run:
            error = the_error(await run.client.post(RESPONSES, json={"model": "fake", "input": "hi", **fields}), 400)
            assert error["param"] == param
            assert says_what in error["message"]

    asyncio.run(scenario())


def test_a_stream_that_fails_says_so() -> None:
    async def scenario() -> None:
        async with serving(lambda request: [65, -1]) as run, run.openai(max_retries=0) as client:
            events = [event async for event in await client.responses.create(model="fake", input="hi", stream=True)]
            assert [event.type for event in events[-2:]] == ["error", "response.failed"]
            last: Any = events[-1]
            assert (last.response.status, last.response.error.message) == ("failed", "the fake broke")

    asyncio.run(scenario())
