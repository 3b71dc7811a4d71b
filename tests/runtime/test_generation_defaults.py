"""What a request does not set is as the model's generation config says, at every front end."""

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.engine.request import Request, SamplingParams
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.loading import open_model
from nitsum_jax.runtime.calls import derived_seed
from nitsum_jax.runtime.startup.served_model import served_model
from nitsum_jax.server.launch.flags import read_options
from nitsum_jax.server.proto import jetstream_pb2, jetstream_pb2_grpc, nitsum_pb2
from tests.models.golden import tiny_models
from tests.server.harness import Running, ask, running
from tests.server.http.harness import COMPLETIONS, HELLO, Serving, serving

SAYS = GenerationDefaults(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1, max_new_tokens=40)
AS_IT_SAYS = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1)


def unseeded(request: Request) -> SamplingParams:
    return dataclasses.replace(request.sampling, seed=None)


def over_http(act: Callable[[Serving], Awaitable[Any]], defaults: GenerationDefaults = SAYS) -> list[Request]:
    async def scenario() -> list[Request]:
        async with serving(defaults=defaults) as run:
            await act(run)
            return list(run.engine.requests)

    return asyncio.run(scenario())


def over_grpc(act: Callable[[Running], Awaitable[Any]], defaults: GenerationDefaults = SAYS) -> list[Request]:
    async def scenario() -> list[Request]:
        async with running(defaults=defaults) as run:
            await act(run)
            return list(run.engine.requests)

    return asyncio.run(scenario())


def completion(**fields: Any) -> Callable[[Serving], Awaitable[Any]]:
    return lambda run: run.client.post(COMPLETIONS, json={"model": "fake", "prompt": "a", **fields})


def test_http() -> None:
    (chat,) = over_http(lambda run: run.chat(HELLO))
    assert (unseeded(chat), chat.max_tokens) == (AS_IT_SAYS, 40)
    (text,) = over_http(completion())
    assert (unseeded(text), text.max_tokens) == (AS_IT_SAYS, 16)  # OpenAI's limit of completions stays


def test_http_requests_win() -> None:
    off = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "max_tokens": 50}
    (request,) = over_http(lambda run: run.chat(HELLO, **off))
    assert (unseeded(request), request.max_tokens) == (SamplingParams(), 50)
    (request,) = over_http(completion(temperature=1.5, top_k=-1, top_p=None))
    assert unseeded(request) == dataclasses.replace(AS_IT_SAYS, temperature=1.5, top_k=0)


def test_http_without_a_word_of_the_model() -> None:
    (request,) = over_http(completion(), GenerationDefaults())
    assert unseeded(request) == SamplingParams(temperature=1.0)
    (request,) = over_http(completion(), GenerationDefaults(temperature=0.0))
    assert unseeded(request) == SamplingParams()


def test_a_limit_of_the_model_does_not_reach_beyond_the_context() -> None:
    (usual,) = over_http(lambda run: run.chat(HELLO), GenerationDefaults())
    (capped,) = over_http(lambda run: run.chat(HELLO), GenerationDefaults(max_new_tokens=10**9))
    assert capped.max_tokens == usual.max_tokens < 10**9
    (least,) = over_http(lambda run: run.chat(HELLO, min_tokens=60))
    assert least.max_tokens == 60


def test_grpc() -> None:
    (request,) = over_grpc(lambda run: ask(run.stub))
    assert (unseeded(request), request.max_tokens) == (AS_IT_SAYS, 40)
    sampling = nitsum_pb2.SamplingParams(temperature=0.0, top_k=0, presence_penalty=0.5)
    (request,) = over_grpc(lambda run: ask(run.stub, sampling=sampling, max_tokens=7))
    expected = dataclasses.replace(AS_IT_SAYS, temperature=0.0, top_k=0, presence_penalty=0.5)
    assert (unseeded(request), request.max_tokens) == (expected, 7)
    (request,) = over_grpc(lambda run: ask(run.stub), GenerationDefaults())
    assert (unseeded(request), request.max_tokens) == (SamplingParams(), 256)


async def decode(run: Running, samples: int) -> None:
    content = jetstream_pb2.DecodeRequest.TextContent(text="a")
    message = jetstream_pb2.DecodeRequest(text_content=content, num_samples=samples)
    async for _ in jetstream_pb2_grpc.OrchestratorStub(run.channel).Decode(message, timeout=20):
        pass


def test_jetstream_is_greedy_unless_several_samples_are_drawn() -> None:
    (request,) = over_grpc(lambda run: decode(run, 1))
    assert (unseeded(request), request.max_tokens) == (SamplingParams(), 40)
    first, second = over_grpc(lambda run: decode(run, 2))
    assert unseeded(first) == unseeded(second) == AS_IT_SAYS
    assert second.sampling.seed == derived_seed(first.sampling.seed or 0, 1)
    drawn, _ = over_grpc(lambda run: decode(run, 2), GenerationDefaults(temperature=0.0, top_k=5))
    assert unseeded(drawn) == SamplingParams(temperature=1.0, top_k=5)  # greedy samples would all be the same


# ---- the flag


def model_that_says(folder: Path, **said: Any) -> Path:
    path = tiny_models.write_hf_folder("llama_odd", folder)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **said}))
    return path


def test_the_flag() -> None:
    assert read_options(["nitsum-serve"]).generation_config == "auto"
    assert read_options(["nitsum-serve", "--generation_config=none"]).generation_config == "none"
    with pytest.raises(InvalidInputError, match="generation_config"):
        read_options(["nitsum-serve", "--generation_config=vllm"])


def test_none_leaves_out_what_the_model_says(tmp_path: Path) -> None:
    model = open_model(str(model_that_says(tmp_path, do_sample=True, temperature=0.6)))
    assert served_model(model, None).defaults == GenerationDefaults(temperature=0.6)
    assert served_model(model, None, "none").defaults == GenerationDefaults()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"top_p": 0.0}, "top_p=0.0 is out of range"),
        ({"temperature": -1}, "temperature=-1.0 is out of range"),
        ({"temperature": float("nan")}, "temperature=nan is out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
        ({"min_p": "x"}, "min_p is 'x', which is not a number"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    model = open_model(str(model_that_says(tmp_path, **said)))
    with pytest.raises(InvalidInputError, match=f"cannot be used: {message}.*generation_config=none"):
        served_model(model, "fake")
    assert served_model(model, "fake", "none").defaults == GenerationDefaults()
