"""A device is lost and comes back under live streams of a real server over a real engine."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio
import jax
import pytest

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.scheduling import costs
from nitsum_jax.runtime.scheduling.tiered import TieredScheduling
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.grpc.server import GrpcServer, in_thread
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from tests.engine.harness import tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT = "llama_odd"
TOKENS = 60
WAIT_S = 240.0


def test_streams_outlive_a_lost_device_and_it_comes_back(tmp_path: Path) -> None:
    asyncio.run(_test(tmp_path))


async def _test(folder: Path) -> None:
    model = tiny_model(VARIANT, folder)
    config = EngineConfig(
        devices=4,
        layout="tp1x4",
        layouts=("tp1x4",),
        dtype="float32",
        max_batch=8,
        prefill_chunk=32,
        max_model_len=256,
        deterministic=True,
    )
    cost = costs.predicted(config, model.config, None, jax.devices()[:4])
    router = StreamRouter(asyncio.get_running_loop())
    scheduling = TieredScheduling(DEFAULT_TIERS, cost, config.max_queue, admitted=router.admitted)
    engine = await in_thread(lambda: start_engine(model, config, router.sink, scheduling))
    server = GrpcServer("127.0.0.1", 0)
    try:
        await server.start()
        served = ServedModel("tiny", model.tokenizer, model.config.vocab_size, (), None)
        await server.serve(Backend(engine, served, router))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            calm = await _streams(stub, engine, lose=())
            assert len(set(scheduling.plan().instances)) == 4
            assert await _streams(stub, engine, lose=(1,)) == calm
            assert engine.lost_devices() == (1,)
            assert engine.layout().devices == (0, 2, 3)
            assert {i.devices for i in scheduling.plan().instances} == {(0,), (2,), (3,)}
            engine.restore_device(1)
            await _until(lambda: str(engine.layout()) == "tp1x4")
            assert await _streams(stub, engine, lose=()) == calm
            assert {i.devices for i in scheduling.plan().instances} == {(0,), (1,), (2,), (3,)}
        stats = engine.stats()
        assert (stats.waiting, stats.running) == (0, 0)
        assert stats.sent_back > 0
    finally:
        await server.stop()
        engine.close()


async def _streams(
    stub: nitsum_pb2_grpc.GenerationServiceStub, engine: Engine, lose: Sequence[int]
) -> list[tuple[int, ...]]:
    """What eight streams say; the devices are lost once all of them have begun."""
    begun = [0] * 8

    async def one(index: int) -> tuple[int, ...]:
        request = nitsum_pb2.GenerateRequest(
            tokens=nitsum_pb2.TokenPrompt(ids=[3 + index, 7, 11] * (1 + 4 * index)), max_tokens=TOKENS, ignore_eos=True
        )
        said: list[int] = []
        async for event in stub.Generate(request, timeout=WAIT_S):
            said += event.delta.token_ids
            begun[index] = len(said)
            if lose and min(begun) >= 2 and not engine.lost_devices():
                for device in lose:
                    engine.lose_device(device)
                    await _until(lambda: bool(engine.lost_devices()))
        assert event.WhichOneof("event") == "finished"
        assert len(said) == TOKENS
        return tuple(said)

    return list(await asyncio.gather(*(one(index) for index in range(8))))


async def _until(condition: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to be in time")
