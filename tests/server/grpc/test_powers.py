"""Forms, tools, thoughts and scores over gRPC."""

import asyncio
import json
from typing import Any

import grpc
import jsonschema
import pytest

from nitsum_jax.server.proto import nitsum_pb2 as pb
from tests.server.harness import EOS, TOKENIZER, Running, ask, echo, held, refusal, running, says

HERMES = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{{ extra | default('') }}{# </think> #}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Rom"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = pb.Tool(name="weather", description="Of a city.", parameters=json.dumps(CITY))
HI = pb.ChatMessage(role="user", content="hi")


def test_forms() -> None:
    async def scenario() -> None:
        async with running(held) as run:
            schema = json.dumps({"type": "array", "items": {"type": "boolean"}, "maxItems": 2})
            for form, valid in (
                (pb.OutputForm(json_schema=schema), lambda text: len(json.loads(text)) <= 2),
                (pb.OutputForm(regex="[ab]{3}"), lambda text: set(text) <= {"a", "b"}),
                (pb.OutputForm(choice=pb.Choices(options=["yes", "no"])), lambda text: text in ("yes", "no")),
                (pb.OutputForm(grammar='start: "x" "y"'), lambda text: text == "xy"),
                (pb.OutputForm(json_object=True), lambda text: text.startswith("{")),
            ):
                answer = await ask(run.stub, form=form, ignore_eos=True)
                assert valid(answer.text), (form, answer.text)

    asyncio.run(scenario())


def test_calls_and_thoughts() -> None:
    said = '<think>hm</think>Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'

    async def scenario() -> None:
        async with running(says(said), template=HERMES) as run:
            answer = await ask(run.stub, chat=pb.ChatPrompt(messages=[HI], tools=[TOOL]))
            assert answer.text == "Let me see."
            assert "".join(delta.reasoning for delta in answer.deltas) == "hm"
            calls = [call for delta in answer.deltas for call in delta.tool_calls]
            assert [call.name for call in calls if call.name] == ["weather"]
            assert json.loads("".join(call.arguments for call in calls)) == {"city": "Rom"}
            assert "Of a city." in TOKENIZER.decode(run.engine.requests[0].prompt_ids)
            assert (await ask(run.stub, chat=pb.ChatPrompt(messages=[HI]))).text == said  # as it always was
            assert (await ask(run.stub, chat=pb.ChatPrompt(messages=[HI]), split=True)).text.startswith("Let me see.")
            call = pb.ToolCall(id="1", name="weather", arguments="{}")
            turns = [
                HI,
                pb.ChatMessage(role="assistant", tool_calls=[call]),
                pb.ChatMessage(role="tool", content="sun"),
            ]
            await ask(run.stub, chat=pb.ChatPrompt(messages=turns, template_variables='{"extra": "E"}'))
            assert (
                TOKENIZER.decode(run.engine.requests[-1].prompt_ids) == "E<user>hi<assistant>None<tool>sun<assistant>"
            )
        async with running(held, template=HERMES) as run:
            for choice in ("required", "=weather"):
                forced = pb.ChatPrompt(messages=[HI], tools=[TOOL], tool_choice=choice, single_tool_call=True)
                calls = [call for delta in (await ask(run.stub, chat=forced)).deltas for call in delta.tool_calls]
                jsonschema.validate(json.loads("".join(call.arguments for call in calls)), CITY)
        async with running(echo, template=HERMES) as run:
            turns = [HI, pb.ChatMessage(role="assistant", content="Once")]
            answer = await ask(run.stub, chat=pb.ChatPrompt(messages=turns, continue_final_message=True))
            assert answer.text == "<user>hi<assistant>Once"

    asyncio.run(scenario())


def test_scores_stops_and_special_tokens() -> None:
    async def scenario() -> None:
        async with running(says("one two")) as run:
            ids = TOKENIZER.encode("hello")
            answer = await ask(run.stub, prompt_logprobs=2, max_tokens=0)
            assert (answer.text, answer.finished.usage.output_tokens) == ("", 0)
            scores = answer.finished.prompt_logprobs
            assert [score.token_id for score in scores] == ids[1:]
            assert [len(score.top) for score in scores] == [2] * (len(ids) - 1)
            assert answer.finished.usage.prompt_tokens == len(ids)
            answer = await ask(run.stub, prompt_logprobs=0, return_prompt_ids=True)
            assert (answer.text, list(answer.started.prompt_ids)) == ("one two", ids)
            assert not any(delta.logprobs for delta in answer.deltas)
            assert (await ask(run.stub, stop=["e t"], include_stop=True)).text == "one t"
        async with running(lambda request: [EOS, EOS]) as run:
            assert (await ask(run.stub, ignore_eos=True, max_tokens=1, show_special_tokens=True)).text == "<end>"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "code", "says_what"),
    [
        ({"form": pb.OutputForm()}, grpc.StatusCode.INVALID_ARGUMENT, "the form is empty"),
        ({"form": pb.OutputForm(json_schema="{")}, grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
        ({"form": pb.OutputForm(json_schema="[" * 5000)}, grpc.StatusCode.INVALID_ARGUMENT, "not valid JSON"),
        ({"form": pb.OutputForm(regex="[")}, grpc.StatusCode.INVALID_ARGUMENT, "regex parse error"),
        ({"chat": pb.ChatPrompt(messages=[HI], tools=[TOOL])}, grpc.StatusCode.FAILED_PRECONDITION, "teaches no way"),
        ({"chat": pb.ChatPrompt(messages=[HI], tool_choice="any")}, grpc.StatusCode.INVALID_ARGUMENT, "not known"),
        ({"chat": pb.ChatPrompt(messages=[HI], template_variables="1")}, grpc.StatusCode.INVALID_ARGUMENT, "an object"),
        ({"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT, "max_tokens=0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused(fields: dict[str, Any], code: grpc.StatusCode, says_what: str) -> None:
    async def generate(run: Running) -> None:
        prompt: dict[str, Any] = {} if "chat" in fields else {"text": "hello"}
        async for _ in run.stub.Generate(pb.GenerateRequest(**prompt, **fields), timeout=20):
            pass

    async def scenario() -> None:
        async with running() as run:
            error = await refusal(generate(run))
            assert error.code() is code
            assert says_what in str(error.details())

    asyncio.run(scenario())
