"""A call for several outputs holds as many of its client's places."""

import asyncio
import json
from typing import Any

import grpc
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.proto import jetstream_pb2, jetstream_pb2_grpc, nitsum_pb2
from nitsum_jax.server.security.errors import RateLimitedError
from nitsum_jax.server.security.limits import Limits
from tests.server.harness import refusal, until
from tests.server.operations.http import Reply, fetch
from tests.server.operations.ports import Open, opened


def test_places_grow_and_are_given_back() -> None:
    limits = Limits(lambda: 0.0)
    for _ in range(2):
        with limits.use("a", None, 4) as first:
            first.more(2)
            with limits.use("a", None, 4) as second:
                with pytest.raises(RateLimitedError, match="a has 4 open at once and may have 4"):
                    second.more(1)
                with pytest.raises(InvalidInputError, match=r"5 outputs are more than a may .* at most 4"):
                    second.more(4)
            with limits.use("a", None, None) as unlimited:
                unlimited.more(100)
    with limits.use("a", None, 1):  # nothing is left over
        pass


def test_outputs_count_for_the_limit_of_their_client() -> None:
    async def complete(open_: Open, **fields: Any) -> Reply:
        body = json.dumps({"model": "fake", "prompt": "a", "max_tokens": 1, **fields}).encode()
        return await fetch(f"{open_.api}/v1/completions", "POST", {"content-type": "application/json"}, body)

    async def scenario() -> None:
        async with opened(OpsOptions(streams_per_client=4), pooling=Pooling.MEAN) as open_:
            engine = open_.run.engine
            engine.hold()
            alive = asyncio.create_task(complete(open_, n=3))
            await until(lambda: engine.stats().waiting == 3)
            for fields in ({"n": 2}, {"prompt": ["a", "b"]}):
                reply = await complete(open_, **fields)
                assert (reply.status, reply.json["error"]["code"]) == (429, "rate_limit_exceeded")
                assert reply.headers["retry-after"] == "1"
            reply = await complete(open_, n=5)  # trying again would not help
            assert (reply.status, reply.json["error"]["code"]) == (400, None)
            assert "127.0.0.1 may have at once: ask for at most 4" in reply.json["error"]["message"]
            assert engine.stats().waiting == 3
            stub = jetstream_pb2_grpc.OrchestratorStub(open_.run.channel)
            message = jetstream_pb2.DecodeRequest(
                text_content=jetstream_pb2.DecodeRequest.TextContent(text="p"), num_samples=3, max_tokens=1
            )
            error = await refusal(stub.Decode(message).read())  # by whichever protocol, it is the same client
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(error.trailing_metadata())["retry-after-ms"] == "1000"
            message.num_samples = 5
            assert (await refusal(stub.Decode(message).read())).code() is grpc.StatusCode.INVALID_ARGUMENT
            vectors = nitsum_pb2.EmbedRequest(inputs=[nitsum_pb2.EmbedInput(text="a")] * 2)
            error = await refusal(open_.run.stub.Embed(vectors))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            engine.release()
            assert (await alive).status == 200
            message.num_samples = 4
            assert [one async for one in stub.Decode(message)]
            assert (await complete(open_, n=4)).status == 200
            registry = open_.ports.views.present().registry
            labels = {"model_name": "fake", "reason": "rate_limit"}
            assert registry.get_sample_value("nitsum_calls_refused_total", labels) == 4

    asyncio.run(scenario())
