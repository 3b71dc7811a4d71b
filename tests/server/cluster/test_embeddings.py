"""Embeddings through a front door, over gRPC: made by cells, also when one of them ends meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio
import numpy as np

from nitsum_jax.models.pooling import Pooling
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.server.grpc.server import GrpcServer
from nitsum_jax.server.proto import nitsum_pb2 as pb
from nitsum_jax.server.proto import nitsum_pb2_grpc
from tests.server.cluster.test_front import Cluster, cluster, until
from tests.server.fake_engine import fake_embedding
from tests.server.harness import TOKENIZER, refusal, served_model


@contextlib.asynccontextmanager
async def door(made: Cluster) -> AsyncIterator[nitsum_pb2_grpc.GenerationServiceStub]:
    server = GrpcServer("127.0.0.1", 0)
    await server.start()
    try:
        await server.serve(Backend(made.engine, served_model(pooling=Pooling.MEAN), made.router))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield nitsum_pb2_grpc.GenerationServiceStub(channel)
    finally:
        await server.stop()


def wanted(texts: list[str]) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.EmbedInput(text=text) for text in texts])


def test_vectors_come_from_the_cells_even_if_one_ends() -> None:
    async def scenario() -> None:
        async with cluster(2, pooling=Pooling.MEAN) as made, door(made) as stub:
            texts = [f"text number {n}" for n in range(16)]
            for cell in made.cells.values():
                cell.engine.hold()
            call = asyncio.ensure_future(stub.Embed(wanted(texts), timeout=20))
            await until(lambda: min(made.at().values()) > 0 and sum(made.at().values()) == len(texts))
            made.cells["cell-0"].die()
            made.cells["cell-1"].engine.release()
            answer = await call
            for text, one in zip(texts, answer.embeddings, strict=True):
                np.testing.assert_array_equal(np.float32(one.values), fake_embedding(TOKENIZER.encode(text)))

    asyncio.run(scenario())


def test_cells_that_make_none_are_not_asked() -> None:
    async def scenario() -> None:
        async with cluster(1) as made, door(made) as stub:
            error = await refusal(stub.Embed(wanted(["a"]), timeout=20))
            assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert made.cells["cell-0"].taken == []

    asyncio.run(scenario())
