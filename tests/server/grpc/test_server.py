import asyncio
import socket

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.server.address import callable_host, check_bindable, target
from nitsum_jax.server.grpc.server import GrpcServer, in_thread
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from tests.server.harness import ask, refusal, running, says, until

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_SERVICES = ("", "nitsum.v1.GenerationService")


async def _health(channel: grpc.aio.Channel) -> set[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in _SERVICES}


def test_while_starting_health_says_not_serving_and_calls_are_unavailable() -> None:
    async def scenario() -> None:
        server = GrpcServer("127.0.0.1", 0)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            assert await _health(channel) == {_NOT_SERVING}
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            set_layout = stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4"))
            for call in (ask(stub), stub.GetLayout(nitsum_pb2.GetLayoutRequest()), set_layout):
                error = await refusal(call)
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                assert "starting" in error.details()
        await server.stop()

    asyncio.run(scenario())


def test_serving_then_draining() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            assert await _health(run.channel) == {_SERVING}
            alive = asyncio.create_task(ask(run.stub, max_tokens=150))
            await until(lambda: run.engine.stats().running == 1)
            run.engine.hold()
            draining = asyncio.create_task(run.server.drain(20))
            await asyncio.sleep(0.01)
            assert await _health(run.channel) == {_NOT_SERVING}
            error = await refusal(ask(run.stub))
            assert (error.code(), "draining" in error.details()) == (grpc.StatusCode.UNAVAILABLE, True)
            error = await refusal(run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4")))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert (await run.stub.GetLayout(nitsum_pb2.GetLayoutRequest())).layout == "tp1x4"
            assert not alive.done()
            run.engine.release()
            assert await draining
            assert len((await alive).ids) == 150

    asyncio.run(scenario())


def test_a_drain_that_takes_too_long_says_so_and_stop_cuts_the_rest() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            alive = asyncio.create_task(ask(run.stub, max_tokens=10**6))
            await until(lambda: run.engine.stats().running == 1)
            assert not await run.server.drain(0.05)
            await run.server.stop()
            assert (await refusal(alive)).code() is grpc.StatusCode.UNAVAILABLE
            await until(lambda: run.engine.stats().running == 0)

    asyncio.run(scenario())


def test_get_layout_tells_the_whole_state() -> None:
    async def scenario() -> None:
        async with running() as run:
            await ask(run.stub, "abc")
            state = await run.stub.GetLayout(nitsum_pb2.GetLayoutRequest())
            assert (state.model, state.layout) == ("fake", "tp1x4")
            assert [(list(i.devices), i.tp, i.role) for i in state.instances] == [([d], 1, "mixed") for d in range(4)]
            assert list(state.allowed_layouts) == ["tp1x4", "tp2x2", "tp4", "tp2+tp1x2"]
            assert list(state.ready_layouts) == ["tp1x4", "tp2x2"]
            assert list(state.devices) == ["fake:0", "fake:1", "fake:2", "fake:3"]
            assert list(state.tiers) == ["interactive", "standard", "batch"]
            assert state.stats.tokens_generated == 3
            assert state.stats.blocks_free == state.stats.blocks_total > 0

    asyncio.run(scenario())


def test_set_layout_under_streams_returns_the_report() -> None:
    async def scenario() -> None:
        async with running() as run:
            text = "a prompt that is echoed while the layout changes" * 40
            streams = [asyncio.create_task(ask(run.stub, text, max_tokens=2000)) for _ in range(4)]
            await until(lambda: run.engine.stats().running == 4)
            for layout in ("tp2x2", "tp4", "tp2+tp1x2"):
                report = await run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=layout))
                assert report.to_layout == layout
                assert report.stall_ms == 0.25
            assert report.from_layout == "tp4"
            assert [(await stream).text for stream in streams] == [text] * 4

    asyncio.run(scenario())


def test_a_caller_that_leaves_does_not_stop_a_switch() -> None:
    async def scenario() -> None:
        async with running() as run:
            run.engine.hold()
            error = await refusal(run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4"), timeout=0.1))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            run.engine.release()
            await until(lambda: str(run.engine.layout()) == "tp4")

    asyncio.run(scenario())


def test_a_switch_that_the_end_of_the_engine_prevents_is_unavailable() -> None:
    async def scenario() -> None:
        async with running() as run:
            run.engine.hold()
            call = asyncio.ensure_future(refusal(run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4"))))
            await asyncio.sleep(0.1)
            await asyncio.to_thread(run.engine.close)
            assert (await call).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_reflection_names_the_services_and_their_messages() -> None:
    async def scenario() -> None:
        async with running() as run:
            stub = reflection_pb2_grpc.ServerReflectionStub(run.channel)
            ask_for = reflection_pb2.ServerReflectionRequest
            questions = [ask_for(list_services=""), ask_for(file_containing_symbol="nitsum.v1.GenerateRequest")]
            answers = [answer async for answer in stub.ServerReflectionInfo(iter(questions))]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {"nitsum.v1.GenerationService", "grpc.health.v1.Health"} <= names
            files = answers[1].file_descriptor_response.file_descriptor_proto
            assert nitsum_pb2.DESCRIPTOR.serialized_pb in files

    asyncio.run(scenario())


def test_a_port_in_use_is_told_at_once() -> None:
    async def scenario() -> None:
        async with running() as run:
            with pytest.raises(PreconditionError, match=rf"port {run.server.port} .*in use.*--port"):
                GrpcServer("127.0.0.1", run.server.port)
            # Also where another address of the same name is still free.
            with pytest.raises(PreconditionError, match="in use"):
                check_bindable("localhost", run.server.port)

    asyncio.run(scenario())


def test_addresses() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    check_bindable("127.0.0.1", port)
    with pytest.raises(InvalidInputError, match=r"--host=no\.such\.host\.invalid"):
        check_bindable("no.such.host.invalid", port)
    with pytest.raises(InvalidInputError, match="is not an address of this machine"):
        check_bindable("192.0.2.1", port)
    with pytest.raises(InvalidInputError, match="--port=70000"):
        check_bindable("127.0.0.1", 70_000)
    assert target("::1", 5) == "[::1]:5"
    assert callable_host("0.0.0.0") == "127.0.0.1"


def test_in_thread_hands_over_results_and_errors() -> None:
    async def scenario() -> None:
        assert await in_thread(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)

    asyncio.run(scenario())
