"""The times of a request count from the moment at which it had come, whatever the server does before it begins."""

import asyncio
import time
from typing import Any

import pytest

from nitsum_jax.models.pooling import Pooling
from nitsum_jax.runtime import calls
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.server.http.openai import plan
from nitsum_jax.server.proto import jetstream_pb2, jetstream_pb2_grpc, nitsum_pb2
from tests.server.harness import Running, running, says, until
from tests.server.http.harness import serving

BUSY_S = 0.2


class Records:
    """Takes what has ended."""

    def __init__(self) -> None:
        self.ended_ones: list[ServedRequest] = []

    def ended(self, record: ServedRequest) -> None:
        self.ended_ones.append(record)

    def refused(self, tier: str, error: Exception) -> None:
        raise AssertionError(error)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prompt keeps the event loop from everything else for a while."""

    async def encode(*args: Any) -> Any:
        time.sleep(BUSY_S)
        return await calls_encode(*args)

    calls_encode = calls.encode
    for module in (plan, calls):
        monkeypatch.setattr(module, "encode", encode)
    monkeypatch.setattr("nitsum_jax.server.grpc.jetstream.encode", encode)


@pytest.mark.usefixtures("busy")
def test_requests_that_come_at_once_have_all_arrived_then() -> None:
    async def scenario() -> None:
        async with serving(says("x"), max_batch=64) as run:
            records = run.grpc.router.observer = Records()
            host, _, port = run.url.removeprefix("http://").partition(":")
            body = b'{"model": "fake", "prompt": "a"}'
            lines = (b"POST /v1/completions HTTP/1.1", b"host: x", b"content-type: application/json")
            head = b"\r\n".join((*lines, b"content-length: %d" % len(body), b"", b""))
            connections = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
            await asyncio.sleep(0.05)  # all are accepted
            for _, writer in connections:
                writer.write(head + body)
            await until(lambda: len(records.ended_ones) == 3)
            for _, writer in connections:
                writer.close()
            waits = sorted(record.ttft_s or 0 for record in records.ended_ones)
            for number, wait in enumerate(waits, start=1):
                assert wait >= 0.95 * number * BUSY_S, waits

    asyncio.run(scenario())


@pytest.mark.usefixtures("busy")
@pytest.mark.parametrize("method", ["Decode", "Embed"])
def test_what_is_done_to_a_prompt_counts_over_grpc_too(method: str) -> None:
    async def call(run: Running) -> None:
        if method == "Embed":
            await run.stub.Embed(nitsum_pb2.EmbedRequest(inputs=[nitsum_pb2.EmbedInput(text="a")]), timeout=20)
            return
        content = jetstream_pb2.DecodeRequest.TextContent(text="a")
        stub = jetstream_pb2_grpc.OrchestratorStub(run.channel)
        async for _ in stub.Decode(jetstream_pb2.DecodeRequest(text_content=content, max_tokens=2), timeout=20):
            pass

    async def scenario() -> None:
        async with running(says("x"), pooling=Pooling.LAST) as run:
            records = run.router.observer = Records()
            await call(run)
            await until(lambda: bool(records.ended_ones))
            (record,) = records.ended_ones
            assert (record.ended_s or 0) - record.arrival_s >= 0.95 * BUSY_S

    asyncio.run(scenario())
