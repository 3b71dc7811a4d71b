"""Fields that vLLM's clients send, and its endpoints about tokens."""

import asyncio
from typing import Any

import pytest

import nitsum_jax
from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.models.text.chat_options import ChatOptions
from tests.server.harness import EOS, TOKENIZER, echo, says
from tests.server.http.harness import CHAT, HELLO, serving, the_error


def test_usage_in_every_chunk() -> None:
    async def scenario() -> None:
        async with serving(says("abc")) as run:
            events = await run.events(stream_options={"include_usage": True, "continuous_usage_stats": True})
            prompt = len(TOKENIZER.encode("<user>hello<assistant>"))
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert (counts[0], counts[-1]) == (0, 3)
            for event, count in zip(events, counts, strict=True):
                assert event["usage"]["total_tokens"] == prompt + count
            assert [event["choices"] for event in events if not event["choices"]] == [[]]  # the last one

    asyncio.run(scenario())


@pytest.mark.parametrize(("include", "text"), [(None, "one "), (False, "one "), (True, "one two")])
def test_a_stop_string_in_the_output(include: bool | None, text: str) -> None:
    async def scenario() -> None:
        async with serving(says("one two three")) as run:
            fields: dict[str, Any] = {"stop": ["two"], "include_stop_str_in_output": include}
            choice = (await run.chat(**fields)).json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
            events = await run.events(**fields)
            streamed = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
            assert streamed == text

    asyncio.run(scenario())


def test_special_tokens_in_the_output() -> None:
    async def scenario() -> None:
        async with serving(lambda request: [*TOKENIZER.encode("a"), EOS, *TOKENIZER.encode("b")]) as run:
            for skip, text in ((None, "ab"), (True, "ab"), (False, "a<end>b")):
                fields = {"max_tokens": 3, "ignore_eos": True, "skip_special_tokens": skip}
                assert (await run.complete(**fields)).json()["choices"][0]["text"] == text

    asyncio.run(scenario())


def test_the_answer_continues_the_last_message() -> None:
    talk = [*HELLO, {"role": "assistant", "content": "Once upon "}]

    async def scenario() -> None:
        async with serving(echo) as run:
            for fields, prompt in (
                ({}, "<user>hello<assistant>Once upon <assistant>"),
                ({"continue_final_message": True}, "<user>hello<assistant>Once upon "),
                ({"continue_final_message": True, "add_generation_prompt": False}, "<user>hello<assistant>Once upon "),
            ):
                answer = (await run.chat(talk, **fields)).json()["choices"][0]["message"]["content"]
                assert answer == prompt

    asyncio.run(scenario())


def test_what_a_template_puts_behind_the_last_message_is_cut() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}{{ thinking | default('') }}"
    )
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    continued = ChatOptions(continue_final=True)
    assert render_chat(template, talk, continued) == "<user>hi</s><assistant>Well,"
    assert render_chat(template.replace(" | trim", ""), talk, continued) == "<user>hi</s><assistant>Well, "
    assert render_chat(template, talk[:1], ChatOptions(variables={"thinking": "!"})) == "<user>hi</s><assistant>!"


def test_tokens_and_texts() -> None:
    async def scenario() -> None:
        async with serving() as run:
            found = (await run.client.post("/tokenize", json={"prompt": "añ", "return_token_strs": True})).json()
            assert found["tokens"] == TOKENIZER.encode("añ")
            assert (found["count"], found["max_model_len"]) == (3, run.engine.context_limit())
            assert found["token_strs"][0] == "a"
            chat = {"model": "fake", "messages": HELLO, "add_generation_prompt": True}
            found = (await run.client.post("/tokenize", json=chat)).json()
            assert TOKENIZER.decode(found["tokens"]) == "<user>hello<assistant>"
            assert found["token_strs"] is None
            back = await run.client.post("/detokenize", json={"tokens": [*TOKENIZER.encode("añ"), EOS]})
            assert back.json() == {"prompt": "añ<end>"}
            assert (await run.client.get("/version")).json() == {"version": nitsum_jax.__version__}
            for path, body, status, what in (
                ("/tokenize", {}, 400, "give prompt or messages"),
                ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "one of them"),
                ("/tokenize", {"prompt": ""}, 400, "prompt is empty"),
                ("/tokenize", {"prompt": "a", "model": "other"}, 404, "does not exist"),
                ("/detokenize", {"tokens": [257]}, 400, "no token 257"),
                ("/detokenize", {"tokens": []}, 400, "at least one"),
            ):
                assert what in the_error(await run.client.post(path, json=body), status)["message"]

    asyncio.run(scenario())


def test_a_prompt_that_is_too_long_has_a_code_and_advice_for_a_client() -> None:
    async def scenario() -> None:
        async with serving() as run:
            error = the_error(await run.complete("x" * 3000), 400)
            assert error["code"] == "context_length_exceeded"
            assert "--" not in error["message"]  # no flag of a server that is not the client's
            error = the_error(await run.client.post(CHAT, json={"model": "fake", "messages": [{"role": "user"}]}), 400)
            assert error["message"] == "you must provide messages[0].content"

    asyncio.run(scenario())
