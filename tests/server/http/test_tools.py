"""Tools and thoughts, with the official client."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest

from nitsum_jax.engine.request import Request
from tests.server.harness import EOS, TOKENIZER, held, says
from tests.server.http.harness import HELLO, serving

ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
HERMES = "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}" + ROLES
LLAMA = "{% if tools %}<|python_tag|>{% endif %}" + ROLES
MISTRAL = "{% if tools %}[TOOL_CALLS]{% endif %}" + ROLES
MISTRAL_ARGS = "{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}" + ROLES
THINKS = HERMES + "{% if thinking is defined and thinking %}<think>\n{% endif %}{# </think> #}"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 4}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME: Any = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "maxProperties": 0}}}
SAID = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>'


def test_a_call_and_its_result() -> None:
    async def scenario() -> None:
        async with serving(says(SAID), template=HERMES) as run, run.openai() as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER])
            (choice,) = answer.choices
            assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
            assert choice.message.tool_calls is not None
            (call,) = choice.message.tool_calls
            assert call.type == "function"
            assert call.function.name == "weather"
            assert json.loads(call.function.arguments) == {"city": "Bonn", "days": 2}
            prompt = TOKENIZER.decode(run.engine.requests[0].prompt_ids)
            assert '"name": "weather"' in prompt
            message: Any = choice.message
            result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            await client.chat.completions.create(model="fake", messages=[*HELLO, message, result])
            assert TOKENIZER.decode(run.engine.requests[1].prompt_ids).endswith("<tool>rain<assistant>")

    asyncio.run(scenario())


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_calls_stream(tokens_per_step: int) -> None:
    async def scenario() -> None:
        script = says(SAID + SAID.removeprefix("Let me see. "))
        async with serving(script, template=HERMES, tokens_per_step=tokens_per_step) as run, run.openai() as client:
            stream = await client.chat.completions.create(model="fake", messages=HELLO, tools=[WEATHER], stream=True)
            text, finish, calls = "", None, dict[int, list[Any]]()
            async for chunk in stream:
                (choice,) = chunk.choices
                text += choice.delta.content or ""
                for delta in choice.delta.tool_calls or ():
                    assert delta.function is not None
                    if delta.id:
                        calls[delta.index] = [delta.id, delta.function.name, ""]
                    calls[delta.index][2] += delta.function.arguments or ""
                finish = choice.finish_reason or finish
            assert (text, finish) == ("Let me see.", "tool_calls")
            assert list(calls) == [0, 1]
            assert calls[0][0] != calls[1][0]
            for _, name, arguments in calls.values():
                assert (name, json.loads(arguments)) == ("weather", {"city": "Bonn", "days": 2})

    asyncio.run(scenario())


@pytest.mark.parametrize("arguments", ["{", "[" * 5000, "NaN"], ids=["cut", "deep", "no JSON"])
def test_arguments_that_cannot_be_read_reach_the_template_as_they_came(arguments: str) -> None:
    async def scenario() -> None:
        called = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [called]}]
        template = "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments[:9] }}{% endfor %}"
        async with serving(says("x"), template=template) as run:
            assert (await run.chat(turns)).status_code == 200
            assert TOKENIZER.decode(run.engine.requests[0].prompt_ids) == arguments[:9]

    asyncio.run(scenario())


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("template", [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS], ids=["hermes", "llama", "mistral", "args"])
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_forced_calls_hold_their_schema(template: str, choice: Any) -> None:
    async def scenario() -> None:
        async with serving(held, template=template) as run:
            fields = {"tools": [WEATHER, TIME], "tool_choice": choice, "parallel_tool_calls": False}
            for seed in range(3):
                answer = (await run.chat(seed=seed, **fields)).json()["choices"][0]
                assert answer["finish_reason"] == "tool_calls", answer
                (call,) = answer["message"]["tool_calls"]
                tool = next(t for t in (WEATHER, TIME) if t["function"]["name"] == call["function"]["name"])
                assert choice == "required" or tool is WEATHER
                jsonschema.validate(json.loads(call["function"]["arguments"]), tool["function"]["parameters"])

    asyncio.run(scenario())


NESTED: Any = {
    "type": "function",
    "function": {
        "name": "go",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/Place"}},
            "required": ["to"],
            "additionalProperties": False,
            "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}}},
        },
    },
}


@pytest.mark.parametrize("template", [HERMES, LLAMA, MISTRAL, MISTRAL_ARGS], ids=["hermes", "llama", "mistral", "args"])
@pytest.mark.parametrize("tools", [[NESTED], [TIME, NESTED]], ids=["alone", "beside"])
def test_schemas_of_tools_refer_to_themselves(template: str, tools: Any) -> None:
    async def scenario() -> None:
        async with serving(held, template=template) as run:
            choice = {"type": "function", "function": {"name": "go"}} if tools == [NESTED] else "required"
            fields = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
            (call,) = (await run.chat(seed=3, **fields)).json()["choices"][0]["message"]["tool_calls"]
            tool = next(one for one in tools if one["function"]["name"] == call["function"]["name"])
            jsonschema.validate(json.loads(call["function"]["arguments"]), tool["function"]["parameters"])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"regex": r"a\/b"}, "a/b"), ({"guided_choice": ["a/b\nc"]}, "a/b\nc"), ({"regex": r"[/]\\/"}, "/\\/")],
    ids=["escaped slash", "line break", "backslash"],
)
def test_expressions_mean_the_same_beside_tools(fields: Any, said: str) -> None:
    async def scenario() -> None:
        async with serving(held, template=HERMES) as run:
            assert (await run.chat(**fields)).json()["choices"][0]["message"]["content"] == said
            messages = [(await run.chat(seed=n, tools=[TIME], **fields)).json()["choices"][0] for n in range(12)]
            assert said in [choice["message"]["content"] for choice in messages]

    asyncio.run(scenario())


def test_no_tools_and_a_format_beside_tools() -> None:
    async def scenario() -> None:
        async with serving(says(SAID), template=HERMES) as run:
            choice = (await run.chat(tools=[WEATHER], tool_choice="none")).json()["choices"][0]
            assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", SAID)
            assert "weather" not in TOKENIZER.decode(run.engine.requests[0].prompt_ids)
        async with serving(held, template=HERMES) as run:
            fields = {"tools": [WEATHER], "structured_outputs": {"choice": ["yes"]}}
            seen = set()
            for seed in range(12):
                message = (await run.chat(seed=seed, **fields)).json()["choices"][0]["message"]
                seen.add("call" if "tool_calls" in message else message["content"])
            assert seen == {"call", "yes"}

    asyncio.run(scenario())


def test_thoughts() -> None:
    async def scenario() -> None:
        async with serving(says("<think>\nhm\n</think>\n\nHi"), template=THINKS) as run, run.openai() as client:
            message: Any = (await client.chat.completions.create(model="fake", messages=HELLO)).choices[0].message
            assert (message.content, message.reasoning_content) == ("Hi", "hm")
            thought = text = ""
            async for chunk in await client.chat.completions.create(model="fake", messages=HELLO, stream=True):
                delta: Any = chunk.choices[0].delta
                thought += getattr(delta, "reasoning_content", None) or ""
                text += delta.content or ""
            assert (thought.strip(), text) == ("hm", "Hi")

    asyncio.run(scenario())


def test_a_form_holds_behind_a_thought_that_the_template_begins() -> None:
    def script(request: Request) -> Sequence[int]:
        assert request.form is not None
        said = TOKENIZER.encode("well, well</think>\nyes")
        matcher = request.form.matcher()
        for token in said:
            matcher.accept(token)
        assert matcher.ended
        return (*said, EOS)

    async def scenario() -> None:
        async with serving(script, template=THINKS) as run:
            fields = {"chat_template_kwargs": {"thinking": True}, "guided_choice": ["yes", "no"]}
            message = (await run.chat(**fields)).json()["choices"][0]["message"]
            assert (message["content"], message["reasoning_content"]) == ("yes", "well, well")

    asyncio.run(scenario())


def test_thoughts_are_switched_off_by_variables_of_the_template() -> None:
    async def scenario() -> None:
        async with serving(says("x"), template="{{ enable_thinking | default('as it likes') }}" + ROLES) as run:
            off: dict[str, Any] = {"enable_thinking": False}
            for fields, prompt in (
                ({}, "as it likes"),
                ({"reasoning_effort": "none"}, "False"),
                ({"chat_template_kwargs": off}, "False"),
                ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "True"),
            ):
                assert (await run.chat(**fields)).status_code == 200
                said = TOKENIZER.decode(run.engine.requests[-1].prompt_ids)
                assert said == prompt + "<user>hello<assistant>"

    asyncio.run(scenario())
