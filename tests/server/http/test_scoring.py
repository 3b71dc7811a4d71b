"""How likely prompts are: echo with logprobs, prompt_logprobs, and no token at all, as lm-eval asks for."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from nitsum_jax.engine.request import Request
from tests.server.harness import EOS, TOKENIZER, says
from tests.server.http.harness import serving

PROMPT = "né a"
IDS = TOKENIZER.encode(PROMPT)
NAMES = ["n", "bytes:\\xc3", "bytes:\\xa9", " ", "a"]
OFFSETS = [0, 1, 1, 2, 3]


def test_a_prompt_and_its_continuation_are_scored() -> None:
    async def scenario() -> None:
        async with serving(says("bc")) as run:
            for prompt in (PROMPT, IDS, [IDS]):
                answer = (await run.complete(prompt, echo=True, logprobs=1, max_tokens=1)).json()
                (choice,) = answer["choices"]
                assert (choice["text"], choice["finish_reason"]) == (PROMPT + "b", "length")
                told = choice["logprobs"]
                (b,) = TOKENIZER.encode("b")
                assert told["tokens"] == [*NAMES, "b"]
                assert told["token_logprobs"] == [None, *(-token / 1000 for token in (*IDS[1:], b))]
                assert told["text_offset"] == [*OFFSETS, 4]
                assert told["top_logprobs"][0] is None
                assert [len(one) for one in told["top_logprobs"][1:]] == [1] * 5
                usage = answer["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(IDS), 1)

    asyncio.run(scenario())


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {}], ids=["scored", "plain"])
@pytest.mark.parametrize("prompt", [PROMPT, "n"], ids=["long", "of one token"])
def test_no_token_is_made(prompt: str, fields: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with serving(says("bc")) as run:
            answer = (await run.complete(prompt, echo=True, max_tokens=0, **fields)).json()
            (choice,) = answer["choices"]
            assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
            assert answer["usage"]["completion_tokens"] == 0
            if fields:
                assert choice["logprobs"]["tokens"] == NAMES[: len(TOKENIZER.encode(prompt))]
            (event, end) = await run.events("/v1/completions", prompt=prompt, echo=True, max_tokens=0, **fields)
            assert event["choices"][0]["text"] == prompt
            assert end["choices"][0]["finish_reason"] == "length"

    asyncio.run(scenario())


def test_a_stream_begins_with_the_prompt() -> None:
    async def scenario() -> None:
        async with serving(says("bc")) as run:
            fields: dict[str, Any] = {"prompt": [PROMPT, "n"], "echo": True, "n": 2, "logprobs": 0}
            events = await run.events("/v1/completions", **fields)
            for index, prompt in enumerate((PROMPT, PROMPT, "n", "n")):
                mine = [c for event in events for c in event["choices"] if c["index"] == index]
                assert "".join(choice["text"] for choice in mine) == f"{prompt}bc"
                offsets = [offset for c in mine if c["logprobs"] for offset in c["logprobs"]["text_offset"]]
                assert offsets == [*OFFSETS[: len(TOKENIZER.encode(prompt))], len(prompt), len(prompt) + 1]

    asyncio.run(scenario())


def test_log_probabilities_of_prompts_by_ids() -> None:
    async def scenario() -> None:
        async with serving(says("bc")) as run:
            (choice,) = (await run.complete(PROMPT, prompt_logprobs=1)).json()["choices"]
            assert choice["text"] == "bc"
            assert choice["logprobs"] is None
            first, *rest = choice["prompt_logprobs"]
            assert first is None
            for token, entries in zip(IDS[1:], rest, strict=True):
                assert entries[str(token)]["logprob"] == -token / 1000
                assert entries[str(token)]["rank"] == 1
            (choice,) = (await run.chat(prompt_logprobs=0, logprobs=True, top_logprobs=2)).json()["choices"]
            assert len(choice["prompt_logprobs"]) == len(TOKENIZER.encode("<user>hello<assistant>"))
            assert [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]] == [2, 2]

    asyncio.run(scenario())


def test_stops_and_ends_within_a_prompt_end_nothing() -> None:
    def script(request: Request) -> Sequence[int]:
        assert request.prompt_ids == tuple(prompt)
        return (*TOKENIZER.encode("xyz"), EOS)

    prompt = [*TOKENIZER.encode("az"), EOS, *TOKENIZER.encode("b")]

    async def scenario() -> None:
        async with serving(script) as run:
            (choice,) = (await run.complete(prompt, echo=True, logprobs=0, stop=["z"])).json()["choices"]
            assert (choice["text"], choice["stop_reason"]) == ("azbxy", "z")
            (request,) = run.engine.requests
            assert (request.prompt_ids, request.forced_ids) == (tuple(prompt[:1]), tuple(prompt[1:]))

    asyncio.run(scenario())
