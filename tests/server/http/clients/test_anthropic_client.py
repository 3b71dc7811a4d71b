"""Anthropic's Messages API with the official client."""

import asyncio
import json
from typing import Any

import anthropic
import pytest

from tests.server.harness import TOKENIZER, echo, held, says
from tests.server.http.harness import Serving, serving
from tests.server.http.test_tools import HERMES, SAID, THINKS, WEATHER

HI: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": WEATHER["function"]["parameters"],
    "cache_control": {"type": "ephemeral"},
}


def client_of(run: Serving) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=run.url, api_key="none", max_retries=0)


def test_messages() -> None:
    async def scenario() -> None:
        async with serving(echo) as run, client_of(run) as client:
            system: Any = [{"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}}]
            answer = await client.messages.create(model="fake", max_tokens=100, messages=HI, system=system)
            prompt = "<system>be brief<user>hi<assistant>"
            (block,) = answer.content
            assert block.type == "text"
            assert (block.text, answer.stop_reason, answer.role) == (prompt, "end_turn", "assistant")
            assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), len(prompt))
            cut = await client.messages.create(model="fake", max_tokens=3, messages=HI)
            assert cut.stop_reason == "max_tokens"
            stopped = await client.messages.create(model="fake", max_tokens=50, messages=HI, stop_sequences=["hi"])
            assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "hi")
            begun: Any = [*HI, {"role": "assistant", "content": "Once"}]
            answer = await client.messages.create(model="fake", max_tokens=100, messages=begun)
            (block,) = answer.content
            assert block.type == "text"
            assert block.text == "<user>hi<assistant>Once"
            count = await client.messages.count_tokens(model="fake", messages=HI, system="be brief")
            assert count.input_tokens == len(prompt)
            assert len(run.engine.requests) == 4

    asyncio.run(scenario())


def test_events() -> None:
    async def scenario() -> None:
        async with serving(says("<think>hm</think>añ🙂b"), template=THINKS) as run, client_of(run) as client:
            async with client.messages.stream(model="fake", max_tokens=100, messages=HI) as stream:
                kinds = [event.type async for event in stream]
                final = await stream.get_final_message()
            assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
            thought, text = final.content
            assert thought.type == "thinking"
            assert text.type == "text"
            assert (thought.thinking, text.text) == ("hm", "añ🙂b")
            assert final.stop_reason == "end_turn"
            assert final.usage.output_tokens == len(TOKENIZER.encode("<think>hm</think>añ🙂b"))

    asyncio.run(scenario())


def test_tools() -> None:
    async def scenario() -> None:
        async with serving(says(SAID), template=HERMES) as run, client_of(run) as client:
            answer = await client.messages.create(model="fake", max_tokens=300, messages=HI, tools=[TOOL])
            text, use = answer.content
            assert (text.type, answer.stop_reason) == ("text", "tool_use")
            assert use.type == "tool_use"
            assert (use.name, use.input) == ("weather", {"city": "Bonn", "days": 2})
            result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "rain"}]}
            turns: Any = [*HI, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
            await client.messages.create(model="fake", max_tokens=5, messages=turns)
            assert TOKENIZER.decode(run.engine.requests[-1].prompt_ids).endswith("<tool>rain<assistant>")
            async with client.messages.stream(model="fake", max_tokens=300, messages=HI, tools=[TOOL]) as stream:
                pieces = [event.partial_json async for event in stream if event.type == "input_json"]
                final = await stream.get_final_message()
            assert json.loads("".join(pieces)) == {"city": "Bonn", "days": 2}
            assert final.content[1].type == "tool_use"
        async with serving(held, template=HERMES) as run, client_of(run) as client:
            for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}):
                forced: Any = {"tools": [TOOL], "tool_choice": choice}
                answer = await client.messages.create(model="fake", max_tokens=500, messages=HI, **forced)
                (use,) = answer.content
                assert use.type == "tool_use"
                assert use.input.keys() == {"city", "days"}

    asyncio.run(scenario())


def test_the_parts_of_the_prompt_add_up() -> None:
    async def scenario() -> None:
        async with serving(cached=lambda request: 16) as run, client_of(run) as client:
            count = (await client.messages.count_tokens(model="fake", messages=HI)).input_tokens
            whole = await client.messages.create(model="fake", max_tokens=3, messages=HI)
            async with client.messages.stream(model="fake", max_tokens=3, messages=HI) as stream:
                streamed = await stream.get_final_message()
            for usage in (whole.usage, streamed.usage):
                assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (16, 0)
                assert usage.input_tokens == count - 16

    asyncio.run(scenario())


def test_arguments_that_are_cut_are_none() -> None:
    async def scenario() -> None:
        said = '<tool_call>{"name": "weather", "arguments": {"a": ' + "[" * 1000
        async with serving(says(said, end=False), template=HERMES) as run, client_of(run) as client:
            answer = await client.messages.create(model="fake", max_tokens=1000, messages=HI, tools=[TOOL])
            (use,) = answer.content
            assert use.type == "tool_use"
            assert (use.input, answer.stop_reason) == ({}, "max_tokens")

    asyncio.run(scenario())


def test_errors_are_the_exceptions_of_the_client() -> None:
    async def scenario() -> None:
        async with serving() as run, client_of(run) as client:
            with pytest.raises(anthropic.NotFoundError, match="does not exist"):
                await client.messages.create(model="other", max_tokens=5, messages=HI)
            image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
            with pytest.raises(anthropic.BadRequestError, match="'image'") as caught:
                await client.messages.create(model="fake", max_tokens=5, messages=image)
            body: Any = caught.value.body
            assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
            with pytest.raises(anthropic.BadRequestError, match="teaches no way"):
                await client.messages.create(model="fake", max_tokens=5, messages=HI, tools=[TOOL])
            with pytest.raises(anthropic.BadRequestError, match="nonsense"):
                await client.messages.create(model="fake", max_tokens=5, messages=HI, extra_body={"nonsense": 1})
        async with serving(lambda request: [65, -1]) as run, client_of(run) as client:

            async def read() -> None:
                async with client.messages.stream(model="fake", max_tokens=5, messages=HI) as stream:
                    async for _ in stream:
                        pass

            with pytest.raises(anthropic.APIError, match="the fake broke"):
                await read()

    asyncio.run(scenario())
