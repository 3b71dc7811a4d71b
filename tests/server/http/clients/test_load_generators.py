"""The bodies that load generators send, as they send them: streamed and whole, with the usage that they count by."""

import asyncio
from typing import Any

import pytest

from tests.server.harness import says
from tests.server.http.harness import CHAT, COMPLETIONS, serving

TOKENS = 12
USAGE = {"include_usage": True}
# Without model, prompt and length.
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve, completions": (
        COMPLETIONS,
        {"temperature": 0.0, "repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True, "stream_options": USAGE},
    ),
    "vllm bench serve, chat": (CHAT, {"temperature": 0.0, "ignore_eos": True, "stream_options": USAGE}),
    "sglang bench_serving, completions": (COMPLETIONS, {"temperature": 0.0, "best_of": 1, "ignore_eos": True}),
    "sglang bench_serving, chat": (CHAT, {"temperature": 0.0, "ignore_eos": True, "seed": 1}),
    "guidellm": (
        CHAT,
        {"stop": None, "ignore_eos": True, "stream_options": USAGE | {"continuous_usage_stats": True}},
    ),
    "inference-perf": (COMPLETIONS, {"ignore_eos": True, "stream_options": USAGE}),
    "aiperf": (CHAT, {"stream_options": USAGE, "min_tokens": TOKENS}),
}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("name", BODIES)
def test_it_is_answered_and_counted(name: str, stream: bool) -> None:
    path, fields = BODIES[name]
    limit = "max_completion_tokens" if path == CHAT and not name.startswith("guidellm") else "max_tokens"
    parts = [{"role": "user", "content": [{"type": "text", "text": "some words"}]}]
    body = fields | {limit: TOKENS} | ({"messages": parts} if path == CHAT else {"prompt": "some words"})
    if not stream:
        body.pop("stream_options", None)

    async def scenario() -> None:
        async with serving(says("abc", end=False)) as run:
            if not stream:
                post = await run.client.post(path, json={"model": "fake", **body})
                assert post.status_code == 200, post.text
                assert post.json()["usage"]["completion_tokens"] == TOKENS
                return
            events = await run.events(path, **body)
            choices = [choice for event in events for choice in event["choices"]]
            text = "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
            assert text == "abc" * (TOKENS // 3)
            if "stream_options" in body:
                assert events[-1]["usage"]["completion_tokens"] == TOKENS
            if body.get("stream_options", {}).get("continuous_usage_stats"):
                counted = [event["usage"]["completion_tokens"] for event in events]
                assert counted == sorted(counted)
                assert counted[-1] == TOKENS

    asyncio.run(scenario())
