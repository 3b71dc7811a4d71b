"""Embeddings over gRPC: the same vectors, limits and errors as over HTTP, through a cluster's front door too."""

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from nitsum_jax.models.pooling import Pooling
from nitsum_jax.server.proto import nitsum_pb2 as pb
from tests.server.fake_engine import fake_embedding
from tests.server.harness import TOKENIZER, Running, refusal, running, says, until


def texts(*given: str) -> list[pb.EmbedInput]:
    return [pb.EmbedInput(text=text) for text in given]


async def embed(run: Running, metadata: Any = None, **fields: Any) -> pb.EmbedResponse:
    answer: pb.EmbedResponse = await run.stub.Embed(pb.EmbedRequest(**fields), timeout=20, metadata=metadata)
    return answer


def test_texts_and_ids_become_vectors_in_their_order() -> None:
    async def scenario() -> None:
        async with running(says("unheard"), pooling=Pooling.MEAN, cached=lambda request: 2) as run:
            given = ["hello", "a longer text"]
            ids = TOKENIZER.encode("by ids")
            answer = await embed(run, inputs=[*texts(*given), pb.EmbedInput(tokens=pb.TokenPrompt(ids=ids))])
            for text, one in zip([*given, "by ids"], answer.embeddings, strict=True):
                np.testing.assert_array_equal(np.float32(one.values), fake_embedding(TOKENIZER.encode(text)))
            assert answer.usage == pb.Usage(prompt_tokens=5 + 13 + 6, cached_tokens=3 * 2)
            assert {(one.max_tokens, one.pooling) for one in run.engine.requests} == {(1, Pooling.MEAN)}

    asyncio.run(scenario())


def test_tier_and_targets_come_by_field_or_by_metadata() -> None:
    async def scenario() -> None:
        gateway = (("x-slo-ttft-ms", "250"), ("x-gateway-inference-objective", "batch"))
        async with running(says("x"), pooling=Pooling.LAST) as run:
            await embed(run, inputs=texts("a"))
            await embed(run, gateway, inputs=texts("a"))
            await embed(run, gateway, inputs=texts("a"), tier="interactive", ttft_ms=30)
            asked = [(one.tier, one.ttft_ms) for one in run.engine.requests]
            assert asked == [("standard", None), ("batch", 250.0), ("interactive", 30.0)]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({}, "there are 0 inputs: give 1 to 128"),
        ({"inputs": texts(*"a" * 129)}, "there are 129 inputs"),
        ({"inputs": [pb.EmbedInput()]}, "input 0 is empty"),
        ({"inputs": texts("a", "")}, "input 1 is empty"),
        ({"inputs": [pb.EmbedInput(tokens=pb.TokenPrompt())]}, "input 0 is empty"),
        ({"inputs": [pb.EmbedInput(tokens=pb.TokenPrompt(ids=[-1]))]}, "outside the vocabulary"),
        ({"inputs": [pb.EmbedInput(tokens=pb.TokenPrompt(ids=[257]))]}, "outside the vocabulary"),
        ({"inputs": texts("a" * 65)}, "has 65 tokens"),
        ({"inputs": texts("a"), "tier": "fast"}, "fast"),
        ({"inputs": texts("a"), "ttft_ms": float("nan")}, "ttft_ms=nan is out of range"),
        ({"inputs": texts(*"abcdef")}, "at most 5 requests may wait"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], what: str) -> None:
    async def scenario() -> None:
        async with running(says("x"), pooling=Pooling.MEAN, context=64, max_queue=5) as run:
            error = await refusal(embed(run, **fields))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
            assert what in (error.details() or "")
            assert run.router.open_streams == 0

    asyncio.run(scenario())


def test_a_model_without_embeddings_says_so() -> None:
    async def scenario() -> None:
        async with running(says("x")) as run:
            error = await refusal(embed(run, inputs=texts("a")))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "start the server with --pooling=last or mean" in (error.details() or "")

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["cancelled", "late"])
def test_a_call_that_ends_early_leaves_nothing(how: str) -> None:
    async def scenario() -> None:
        async with running(says("x"), pooling=Pooling.MEAN) as run:
            run.engine.hold()
            call = run.stub.Embed(pb.EmbedRequest(inputs=texts("a", "b")), timeout=0.5 if how == "late" else 20)
            ended = asyncio.ensure_future(call.code())
            await until(lambda: run.engine.stats().waiting == 2)
            if how == "cancelled":
                call.cancel()
            await ended
            await until(lambda: run.engine.stats().waiting == 0)
            await until(lambda: run.router.open_streams == 0)

    asyncio.run(scenario())
