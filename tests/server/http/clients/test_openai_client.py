"""The official client, unmodified."""

import asyncio
from typing import Any

import openai
import pytest

from nitsum_jax.engine.request import Request
from nitsum_jax.runtime.calls import derived_seed
from tests.server.harness import EOS, TOKENIZER, says, until
from tests.server.http.harness import HELLO, serving

WORDS = "answer: añ🙂b"


def test_chat_with_the_async_client() -> None:
    async def scenario() -> None:
        async with serving() as run, run.openai() as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO)
            (choice,) = answer.choices
            assert (choice.message.role, choice.message.content) == ("assistant", "<user>hello<assistant>")
            assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
            assert (answer.object, answer.model, answer.service_tier) == ("chat.completion", "fake", "default")
            prompt = TOKENIZER.encode("<user>hello<assistant>")
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(prompt)
            assert answer.usage.completion_tokens == len(prompt)
            assert answer.usage.total_tokens == 2 * len(prompt)
            (request,) = run.engine.requests
            assert request.sampling.temperature == 1.0  # OpenAI's default, not ours
            assert request.max_tokens == run.engine.context_limit() - len(prompt)

    asyncio.run(scenario())


def test_an_answer_can_be_sent_back_as_a_message() -> None:
    async def scenario() -> None:
        async with serving(says("yes")) as run, run.openai() as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO)
            turns = [*HELLO, answer.choices[0].message, {"role": "user", "content": "sure?"}]
            await client.chat.completions.create(model="fake", messages=turns)
            prompt = TOKENIZER.decode(run.engine.requests[-1].prompt_ids)
            assert prompt == "<user>hello<assistant>yes<user>sure?<assistant>"

    asyncio.run(scenario())


def test_chat_stream_with_the_async_client() -> None:
    async def scenario() -> None:
        async with serving(says(WORDS), step_s=0.03) as run, run.openai() as client:
            stream = await client.chat.completions.create(
                model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
            first, *middle, last, usage = chunks
            assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
            texts = [chunk.choices[0].delta.content for chunk in middle]
            assert "".join(text or "" for text in texts) == WORDS
            assert len(texts) > 1  # it streamed; a client that is late finds several tokens at once
            assert all("�" not in (text or "") for text in texts)
            assert last.choices[0].finish_reason == "stop"
            assert usage.choices == []
            assert usage.usage is not None
            assert usage.usage.completion_tokens == len(TOKENIZER.encode(WORDS))
            assert len({chunk.id for chunk in chunks}) == 1
            assert all(chunk.usage is None for chunk in chunks[:-1])
            assert first.service_tier == "default"

    asyncio.run(scenario())


def test_the_sync_client() -> None:
    async def scenario() -> None:
        async with serving(says(WORDS)) as run:

            def talk() -> None:
                with openai.OpenAI(base_url=f"{run.url}/v1", api_key="none") as client:
                    assert [model.id for model in client.models.list()] == ["fake"]
                    assert client.models.retrieve("fake").owned_by == "nitsum-jax"
                    answer = client.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=3)
                    assert answer.choices[0].message.content == "ans"
                    assert answer.choices[0].finish_reason == "length"
                    text = ""
                    with client.chat.completions.create(model="fake", messages=HELLO, stream=True) as stream:
                        for chunk in stream:
                            text += chunk.choices[0].delta.content or ""
                    assert text == WORDS
                    completion = client.completions.create(model="fake", prompt="p", max_tokens=100)
                    assert completion.choices[0].text == WORDS

            await asyncio.to_thread(talk)

    asyncio.run(scenario())


def test_completions_of_every_form_of_prompt() -> None:
    async def scenario() -> None:
        async with serving() as run, run.openai() as client:
            for prompt, texts in (
                ("one", ["one"]),
                (["one", "two"], ["one", "two"]),
                (TOKENIZER.encode("ids"), ["ids"]),
                ([TOKENIZER.encode("ids"), TOKENIZER.encode("more")], ["ids", "more"]),
            ):
                answer = await client.completions.create(model="fake", prompt=prompt)
                assert [choice.text for choice in answer.choices] == texts
                assert [choice.index for choice in answer.choices] == list(range(len(texts)))
                assert answer.usage is not None
                assert answer.usage.prompt_tokens == sum(map(len, texts))
                assert answer.object == "text_completion"
            answer = await client.completions.create(model="fake", prompt="x" * 40)
            assert answer.choices[0].text == "x" * 16  # OpenAI's default of max_tokens

    asyncio.run(scenario())


def test_usage_tells_what_the_prefix_cache_had() -> None:
    had = {"one": [0, 2], "three": [4, 3], "<user>hello<assistant>": [16, 16]}  # of the first output, of the second

    def cached(request: Request) -> int:
        return had[TOKENIZER.decode(request.prompt_ids)][int(request.id.rpartition("-")[2]) % 2]

    async def scenario() -> None:
        async with serving(cached=cached) as run, run.openai() as client:
            # What the second output found was computed for the first: the prompt is counted once.
            whole = await client.completions.create(model="fake", prompt=["one", "three"], n=2)
            stream = await client.completions.create(
                model="fake", prompt=["one", "three"], n=2, stream=True, stream_options={"include_usage": True}
            )
            last = [chunk async for chunk in stream][-1]
            chat = await client.chat.completions.create(model="fake", messages=HELLO, stop="hello")
            for usage, prompt_tokens, cached_tokens in ((whole.usage, 8, 3), (last.usage, 8, 3), (chat.usage, 22, 16)):
                assert usage is not None
                assert usage.prompt_tokens_details is not None
                assert usage.prompt_tokens_details.cached_tokens == cached_tokens
                assert usage.prompt_tokens == prompt_tokens

    asyncio.run(scenario())


def test_completion_stream_of_several_prompts() -> None:
    async def scenario() -> None:
        async with serving() as run, run.openai() as client:
            stream = await client.completions.create(model="fake", prompt=["one", "three"], n=2, stream=True)
            texts, reasons = ["", "", "", ""], {}
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.text
                    if choice.finish_reason:
                        reasons[choice.index] = choice.finish_reason
            assert texts == ["one", "one", "three", "three"]
            assert reasons == dict.fromkeys(range(4), "stop")

    asyncio.run(scenario())


def test_n_answers_have_seeds_that_follow_from_one() -> None:
    async def scenario() -> None:
        async with serving(says("hi")) as run, run.openai() as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO, n=3, seed=7)
            assert [choice.index for choice in answer.choices] == [0, 1, 2]
            seeds = [request.sampling.seed for request in run.engine.requests]
            assert seeds == [7, derived_seed(7, 1), derived_seed(7, 2)]
            assert len(set(seeds)) == 3
            assert len({request.id for request in run.engine.requests}) == 3
            await client.chat.completions.create(model="fake", messages=HELLO, seed=-1)
            assert run.engine.requests[-1].sampling.seed == 2**32 - 1
            await client.chat.completions.create(model="fake", messages=HELLO, n=2)
            drawn = [request.sampling.seed for request in run.engine.requests[-2:]]
            assert drawn[0] != drawn[1]

    asyncio.run(scenario())


def test_every_sampling_field_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with serving(says("hi")) as run, run.openai() as client:
            await client.chat.completions.create(
                model="fake",
                messages=HELLO,
                temperature=0.5,
                top_p=0.9,
                presence_penalty=0.25,
                frequency_penalty=-0.5,
                logit_bias={"65": -100, "66": 2},
                max_tokens=30,
                user="somebody",
                extra_body={
                    "top_k": 7,
                    "min_p": 0.1,
                    "repetition_penalty": 1.25,
                    "min_tokens": 2,
                    "ignore_eos": True,
                    "stop_token_ids": [9],
                },
            )
            request = run.engine.requests[-1]
            sampling = request.sampling
            assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
            assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.25, -0.5)
            assert sampling.repetition_penalty == 1.25
            assert sampling.logit_bias == ((65, -100.0), (66, 2.0))
            assert (request.max_tokens, request.min_tokens, request.stop_token_ids) == (30, 2, (9,))
            await client.chat.completions.create(
                model="fake", messages=HELLO, temperature=0, extra_body={"top_k": -1, "stop_token_ids": [9]}
            )
            request = run.engine.requests[-1]
            assert (request.sampling.temperature, request.sampling.top_k) == (0.0, 0)
            assert request.stop_token_ids == (EOS, 9)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("asked", "tier", "told"),
    [
        (None, "standard", "default"),
        ("auto", "standard", "default"),
        ("default", "standard", "default"),
        ("flex", "batch", "flex"),
        ("priority", "interactive", "priority"),
        ("batch", "batch", "batch"),
        ("interactive", "interactive", "interactive"),
        ("standard", "standard", "standard"),
    ],
)
def test_service_tiers(asked: str | None, tier: str, told: str) -> None:
    async def scenario() -> None:
        async with serving(says("hi")) as run:
            response = await run.chat(service_tier=asked)
            assert response.json()["service_tier"] == told
            assert run.engine.requests[-1].tier == tier

    asyncio.run(scenario())


def test_logprobs_of_chat() -> None:
    async def scenario() -> None:
        async with serving(says("añ")) as run, run.openai() as client:
            answer = await client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=2)
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.content is not None
            assert [bytes(one.bytes or ()) for one in logprobs.content] == [b"a", b"\xc3", b"\xb1"]
            ids = TOKENIZER.encode("añ")
            assert [one.logprob for one in logprobs.content] == [-token / 1000 for token in ids]
            first = logprobs.content[0]
            assert first.token == "a"
            assert [other.logprob for other in first.top_logprobs] == [-ids[0] / 1000, -(ids[0] - 1) / 1000]
            stream = await client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, stream=True)
            told = [
                (one.token, len(one.top_logprobs))
                async for chunk in stream
                for choice in chunk.choices
                for one in (choice.logprobs.content or [] if choice.logprobs else [])
            ]
            assert [token for token, _ in told] == ["a", "�", "�"]
            assert {top for _, top in told} == {0}

    asyncio.run(scenario())


def test_logprobs_of_completions_and_the_tokens_of_a_stop_string() -> None:
    async def scenario() -> None:
        async with serving(says("ab ENDING")) as run, run.openai() as client:
            answer = await client.completions.create(model="fake", prompt="p", logprobs=1, stop=["END"], max_tokens=50)
            (choice,) = answer.choices
            assert (choice.text, choice.finish_reason) == ("ab ", "stop")
            assert choice.logprobs is not None
            assert choice.logprobs.tokens == ["a", "b", " "]
            assert choice.logprobs.text_offset == [0, 1, 2]
            ids = TOKENIZER.encode("ab ")
            assert choice.logprobs.token_logprobs == [-token / 1000 for token in ids]
            assert choice.logprobs.top_logprobs is not None
            assert choice.logprobs.top_logprobs[0] == {"a": -ids[0] / 1000}
            answer = await client.completions.create(model="fake", prompt="p", logprobs=0, max_tokens=2)
            assert answer.choices[0].logprobs is not None
            assert answer.choices[0].logprobs.top_logprobs == [{}, {}]
            assert (await client.completions.create(model="fake", prompt="p")).choices[0].logprobs is None

    asyncio.run(scenario())


def test_errors_are_the_exceptions_of_the_client() -> None:
    async def scenario() -> None:
        async with serving(max_queue=1) as run, run.openai(max_retries=0) as client:
            with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
                await client.chat.completions.create(model="gpt-4o", messages=HELLO)
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
                await client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
            assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
            tool: Any = {"type": "function", "function": {"name": "f"}}
            with pytest.raises(openai.BadRequestError, match="tools"):
                await client.chat.completions.create(model="fake", messages=HELLO, tools=[tool])
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("gpt-4o")
            with pytest.raises(openai.NotFoundError, match="Unknown request URL"):
                await client.moderations.create(input="x")
            run.engine.hold()
            waiting = asyncio.create_task(client.completions.create(model="fake", prompt="p"))
            await until(lambda: run.engine.stats().waiting == 1)
            with pytest.raises(openai.RateLimitError, match="full") as full:
                await client.completions.create(model="fake", prompt="p")
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert 100 <= int(full.value.response.headers["retry-after-ms"]) <= 10_000
            run.engine.release()
            assert (await waiting).choices[0].text == "p"

    asyncio.run(scenario())


def test_the_client_waits_as_long_as_it_is_told_and_succeeds() -> None:
    async def scenario() -> None:
        async with serving(max_queue=1) as run, run.openai(max_retries=5) as client:
            run.engine.hold()
            waiting = asyncio.create_task(client.completions.create(model="fake", prompt="p"))
            await until(lambda: run.engine.stats().waiting == 1)
            retried = asyncio.create_task(client.completions.create(model="fake", prompt="again"))
            await asyncio.sleep(0.1)
            run.engine.release()
            assert [(await task).choices[0].text for task in (waiting, retried)] == ["p", "again"]

    asyncio.run(scenario())


def test_an_engine_failure_in_a_stream_raises_in_the_client() -> None:
    async def scenario() -> None:
        async with serving(lambda request: [65, 65, -1]) as run, run.openai(max_retries=0) as client:
            stream = await client.completions.create(model="fake", prompt="p", stream=True)
            texts: list[str] = []

            async def read() -> None:
                async for chunk in stream:
                    texts.append(chunk.choices[0].text)

            with pytest.raises(openai.APIError, match="the fake broke"):
                await read()
            assert "".join(texts) == TOKENIZER.decode([65, 65])
            with pytest.raises(openai.InternalServerError, match="the fake broke"):
                await client.completions.create(model="fake", prompt="p")

    asyncio.run(scenario())
