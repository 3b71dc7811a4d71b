"""What is wrong is refused in OpenAI's shape, and others go on."""

import asyncio
import json
from typing import Any

import pytest

from nitsum_jax.engine.request import Request
from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.server.http.body import MAX_BODY_BYTES
from nitsum_jax.server.http.openai.requests import ChatRequest
from nitsum_jax.server.state import ServerPhase
from tests.server.harness import says
from tests.server.http.harness import CHAT, COMPLETIONS, HELLO, serving, the_error

_TOOL = {"type": "function", "function": {"name": "f"}}
_PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("fields", "param", "says_what"),
    [
        ({"temperature": -0.1}, "temperature", "at least 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"temperature": True}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater"),
        ({"top_p": 1.5}, "top_p", "at most 1"),
        ({"top_k": -2}, "top_k", "at least -1"),
        ({"min_p": 2}, "min_p", "at most 1"),
        ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
        ({"seed": 0.5}, "seed", "whole number"),
        ({"seed": 2**63}, "seed", "at most 9223372036854775807"),
        ({"n": 0}, "n", "at least 1"),
        ({"n": 129}, "n", "at most 128"),
        ({"max_tokens": -1}, "max_tokens", "at least 0"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "set stream to false"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "differ"),
        ({"min_tokens": 6, "max_tokens": 5}, None, "min_tokens=6"),
        ({"stop": ""}, "stop", "1 to 256"),
        ({"stop": ["x" * 257]}, "stop", "1 to 256"),
        ({"stop": ["x"] * 17}, "stop", "at most 16"),
        ({"stop": 7}, "stop", "string"),
        ({"stop_token_ids": [257]}, None, "stop token id 257"),
        ({"stop_token_ids": [True]}, "stop_token_ids", "not a token id"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids", "at most 64"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"65": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"65": 1, "065": 2}}, "logit_bias", "twice"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias", "300"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "Unrecognized"),
        ({"service_tier": "gold"}, "service_tier", "'gold'"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "leave one"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "use the field"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "an object"),
        ({"service_tier": "g" * 65}, "service_tier", "64"),
        ({"nonsense": 1}, "nonsense", "Unrecognized request argument supplied: nonsense"),
        ({"tools": [{}]}, "tools[0].type", "must provide"),
        ({"tools": [_TOOL]}, "tools", "teaches no way"),
        ({"tools": [_TOOL, _TOOL], "tool_choice": "none"}, "tools", "two tools"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"tool_choice": "any"}, "tool_choice", "give none, auto"),
        ({"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "names g"),
        ({"functions": [{}]}, "functions", "use tools"),
        ({"response_format": {"type": "grammar"}}, "response_format.type", "'json_schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "give json_schema"),
        ({"guided_json": {"type": "thing"}}, "guided_json", "Invalid type: thing"),
        ({"guided_json": "{"}, "guided_json", "not valid JSON"),
        ({"guided_json": "[" * 5000}, "guided_json", "not valid JSON"),
        ({"guided_regex": "["}, "guided_regex", "regex parse error"),
        ({"guided_grammar": "nonsense"}, "guided_grammar", "cannot be used"),
        ({"ebnf": "root ::= ("}, "ebnf", "Expected ')'"),
        ({"grammar": 'root ::= "\\'}, "grammar", "cannot be used"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "nothing can hold it"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "give one"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "Unrecognized"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "held to one form"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"prediction": {}}, "prediction", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"messages": None}, "messages", "list"),
        ({"messages": []}, "messages", "send at least 1"),
        ({"messages": ["hi"]}, "messages[0]", "an object"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "must provide"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must provide"),
        ({"messages": [*HELLO, {"role": "critic", "content": "x"}]}, "messages[1].role", "'user'"),
        ({"messages": [{"role": "user", "content": [_PART]}]}, "messages[0].content", "'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "text part"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, None, "3017 tokens"),
        ({"model": None}, "model", "string"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_chat(fields: dict[str, Any], param: str | None, says_what: str) -> None:
    async def scenario() -> None:
        async with serving(says("x", end=False)) as run:
            other = asyncio.create_task(run.chat(max_tokens=60))
            error = the_error(await run.client.post(CHAT, json={"model": "fake", "messages": HELLO, **fields}), 400)
            assert (error["type"], error["param"]) == ("invalid_request_error", param)
            assert says_what in error["message"]
            assert len(error["message"]) <= 400
            assert "Input should" not in error["message"]  # pydantic's words
            assert (await other).json()["usage"]["completion_tokens"] == 60
            assert run.grpc.router.open_streams == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("prompt", "says_what"),
    [
        ("", "empty"),
        ([], "list of strings"),
        ([""], "empty"),
        ([[]], "empty"),
        (["a", [1]], "different types"),
        ([1, "a"], "not a token id"),
        ([True], "list of strings"),
        ([-1], "not a token id"),
        ([257], "outside the vocabulary"),
        ([[65], [1.5]], "not a token id"),
        (["a"] * 129, "129 prompts"),
        (7, "list of strings"),
        (None, "list of strings"),
        ({"text": "a"}, "list of strings"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts(prompt: Any, says_what: str) -> None:
    async def scenario() -> None:
        async with serving() as run:
            assert says_what in the_error(await run.complete(prompt), 400)["message"]

    asyncio.run(scenario())


def test_completion_fields() -> None:
    async def scenario() -> None:
        async with serving() as run:
            for fields, param in (
                ({"suffix": "x"}, "suffix"),
                ({"best_of": 2}, "best_of"),
                ({"best_of": True}, "best_of"),
                ({"logprobs": True}, "logprobs"),
                ({"logprobs": 21}, "logprobs"),
            ):
                assert the_error(await run.complete(**fields), 400)["param"] == param
            assert the_error(await run.complete(["a"] * 65, n=2), 400)["param"] == "n"
            run.engine.hold()  # whatever waits or not: more than the queue ever takes is no matter of trying again
            for prompt, n, what in (("a", 65, "n=65"), (["a"] * 33, 2, "n=2 for each of 33 prompts")):
                error = the_error(await run.complete(prompt, n=n), 400)
                assert error["message"].startswith(f"{what} is too large: at most 64 requests may wait")
                assert (error["param"], error["code"]) == ("n", None)
            run.engine.release()
            assert (await run.complete(n=64, max_tokens=1)).status_code == 200
            fine = await run.complete(suffix=None, echo=False, best_of=1, user="u", metadata={"a": "b"})
            assert fine.status_code == 200
            response = await run.client.post(COMPLETIONS, json={"model": "fake"})
            assert the_error(response, 400)["message"] == "you must provide prompt"

    asyncio.run(scenario())


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    nothing = {
        "tools": [],
        "tool_choice": "auto",
        "functions": None,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "logit_bias": {},
        "stop": [],
        "temperature": None,
        "stream": None,
        "parallel_tool_calls": True,
        "safety_identifier": "someone",
    }

    async def scenario() -> None:
        async with serving() as run:
            assert (await run.chat(**nothing)).status_code == 200

    asyncio.run(scenario())


def test_content_may_be_text_parts_and_developers_are_the_system() -> None:
    async def scenario() -> None:
        async with serving() as run:
            parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
            messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts, "name": "me"}]
            answer = (await run.chat(messages)).json()["choices"][0]["message"]["content"]
            assert answer == "<system>be brief<user>one\ntwo<assistant>"

    asyncio.run(scenario())


def test_a_template_that_reads_parts_gets_those_of_the_client() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = {"model": "fake", "messages": [{"role": "user", "content": parts}]}
    messages = [message.rendered() for message in ChatRequest.model_validate(body).messages]
    template = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    assert render_chat(template, messages) == "[one][two]"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "fake", "prompt": "\xff"}',
        b'{"model": "fake", "prompt": "\\ud800"}',
        b'{"model": "fake", "prompt": "a", "temperature": NaN}',
        b'{"model": "fake", "prompt": "a", "temperature": Infinity}',
        b'{"prompt": ' + b"[" * 100_000,
        b"\x00" * 100,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    async def scenario() -> None:
        async with serving() as run:
            response = await run.client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
            assert the_error(response, 400)["code"] == "invalid_json"

    asyncio.run(scenario())


def test_numbers_beyond_all_bounds() -> None:
    async def scenario() -> None:
        async with serving() as run:
            for field, number in (("temperature", "1e999"), ("seed", "9" * 5000), ("n", "1" + "0" * 300)):
                body = f'{{"model": "fake", "prompt": "a", "{field}": {number}}}'
                response = await run.client.post(
                    COMPLETIONS, content=body, headers={"content-type": "application/json"}
                )
                the_error(response, 400)

    asyncio.run(scenario())


def test_content_types() -> None:
    async def scenario() -> None:
        async with serving() as run:
            body = json.dumps({"model": "fake", "prompt": "a"})
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
                response = await run.client.post(COMPLETIONS, content=body, headers={"content-type": kind})
                assert "application/json" in the_error(response, 415)["message"]
            response = await run.client.post(COMPLETIONS, content=body)
            the_error(response, 415)
            headers = {"content-type": "application/json", "content-encoding": "gzip"}
            the_error(await run.client.post(COMPLETIONS, content=body, headers=headers), 415)
            headers = {"content-type": "Application/JSON; charset=utf-8"}
            assert (await run.client.post(COMPLETIONS, content=body, headers=headers)).status_code == 200

    asyncio.run(scenario())


def test_bodies_that_are_too_long_and_long_ones_that_are_not() -> None:
    async def scenario() -> None:
        async with serving(max_queue=200) as run:
            error = the_error(await run.complete("x" * MAX_BODY_BYTES), 413)
            assert error["code"] == "request_too_large"
            error = the_error(await run.complete("x" * 2**20), 400)  # a megabyte of prompt
            assert "1048576 tokens" in error["message"]
            error = the_error(await run.complete([[0]] * 100_000), 400)
            assert "100000 prompts" in error["message"]
            error = the_error(await run.chat([0] * 1_000_000), 400)
            assert error["param"] == "messages[0]"
            error = the_error(await run.client.post(CHAT, json={f"field{n}": n for n in range(100_000)}), 400)
            assert error["param"] == "field0"
            assert (await run.complete("still here")).json()["choices"][0]["text"] == "still here"

    asyncio.run(scenario())


def test_paths_and_methods_that_are_not_there() -> None:
    async def scenario() -> None:
        async with serving() as run:
            for path in ("/", "/v1", "/v1/nothing", "/v1/models/", "/v1//models", "/v1/models/gpt-4o", "/v1/chat"):
                the_error(await run.client.get(path), 404)
            assert the_error(await run.client.get("/nothing"), 404)["code"] == "unknown_url"
            for method, path, allowed in (
                ("GET", CHAT, {"POST"}),
                ("DELETE", COMPLETIONS, {"POST"}),
                ("POST", "/v1/models", {"GET", "HEAD"}),
                ("PUT", "/v1/models/fake", {"GET", "HEAD"}),
                ("OPTIONS", CHAT, {"POST"}),
                ("TRACE", "/health/live", {"GET", "HEAD"}),
            ):
                response = await run.client.request(method, path)
                assert the_error(response, 405)["code"] == "method_not_allowed"
                assert set(response.headers["allow"].split(", ")) == allowed
            assert (await run.client.head("/v1/models")).content == b""

    asyncio.run(scenario())


def test_a_model_without_a_chat_template_and_a_pool_that_is_too_small() -> None:
    async def scenario() -> None:
        async with serving(chat=False, blocks_total=4) as run:
            error = the_error(await run.chat(), 400)
            assert (error["code"], "chat template" in error["message"]) == ("not_possible_here", True)
            error = the_error(await run.complete(max_tokens=500), 400)
            assert (error["code"], "KV pool" in error["message"]) == ("not_possible_here", True)

    asyncio.run(scenario())


def test_tiers_that_the_server_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.server.fake_engine.FakeEngine.tier_names", ("fast", "flex"))

    async def scenario() -> None:
        async with serving(says("x")) as run:
            for asked, told, tier in ((None, "default", "fast"), ("flex", "flex", "flex"), ("fast", "fast", "fast")):
                assert (await run.chat(service_tier=asked)).json()["service_tier"] == told
                assert run.engine.requests[-1].tier == tier
            error = the_error(await run.chat(service_tier="priority"), 400)
            assert error["message"].endswith("give one of auto, default, fast, flex")

    asyncio.run(scenario())


def test_starting_and_draining_are_503_and_only_liveness_stays() -> None:
    async def scenario() -> None:
        async with serving() as run:
            state = run.grpc.server.state
            backend, state.backend, state.phase = state.backend, None, ServerPhase.STARTING
            for response in (await run.chat(), await run.client.get("/v1/models")):
                assert the_error(response, 503)["code"] == "unavailable"
                assert int(response.headers["retry-after"]) >= 1
            assert (await run.client.get("/health/live")).json() == {"status": "live"}
            response = await run.client.get("/health/ready")
            assert (response.status_code, response.json()) == (503, {"status": "starting"})
            assert (await run.client.get("/openapi.json")).json()["openapi"] == "3.1.0"
            state.backend, state.phase = backend, ServerPhase.SERVING
            assert (await run.client.get("/health/ready")).json() == {"status": "ready"}
            await run.grpc.server.drain(1.0)
            the_error(await run.chat(), 503)
            response = await run.client.get("/health/ready")
            assert (response.status_code, response.json()) == (503, {"status": "draining"})
            assert (await run.client.get("/health/live")).status_code == 200

    asyncio.run(scenario())


def test_a_bug_is_a_500_with_the_trace_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Request) -> list[int]:
        raise ZeroDivisionError("secret\ndetails")

    async def scenario() -> None:
        async with serving(broken) as run:
            error = the_error(await run.chat(), 500)
            assert error["message"] == "internal error (ZeroDivisionError): see the server's log"
            assert (await run.client.get("/health/ready")).status_code == 200

    asyncio.run(scenario())
    assert "ZeroDivisionError: secret" in caplog.text


def test_request_ids() -> None:
    async def scenario() -> None:
        async with serving() as run:
            response = await run.client.get("/v1/models", headers={"x-request-id": "mine-1"})
            assert response.headers.get_list("x-request-id") == ["mine-1"]
            made = [(await run.client.get(path)).headers["x-request-id"] for path in ("/v1/models", "/nothing")]
            assert len({*made, "mine-1"}) == 3
            for insane in ("a b", "x" * 129, "<script>", ""):
                response = await run.client.get("/v1/models", headers={"x-request-id": insane})
                assert response.headers["x-request-id"] != insane
                assert len(response.headers["x-request-id"]) == 32
            events = await run.client.post(CHAT, json={"model": "fake", "messages": HELLO, "stream": True})
            assert len(events.headers["x-request-id"]) == 32

    asyncio.run(scenario())
