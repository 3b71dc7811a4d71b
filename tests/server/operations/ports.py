"""A fake engine watched by Operations, with records made by hand or by real calls, for tests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.runtime.records import RequestRecord
from nitsum_jax.runtime.streams.router import Bridge
from nitsum_jax.server.grpc.server import GrpcServer
from nitsum_jax.server.http.app import build_app
from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.launch.ports import House
from nitsum_jax.server.operations.routes import ops_routes
from nitsum_jax.server.proto import nitsum_pb2_grpc
from tests.server.fake_engine import FakeEngine, Script
from tests.server.harness import Running, echo, served_model


def record(**fields: Any) -> RequestRecord:
    """A request of ten output tokens that met its targets: 0.2 s to the first, 10 ms each after."""
    values: dict[str, Any] = {
        "id": "r",
        "tier": "interactive",
        "prompt_tokens": 7,
        "arrival_s": 100.0,
        "admitted_s": 100.05,
        "first_s": 100.2,
        "last_s": 100.29,
        "tokens": 10,
        "ended_s": 100.29,
        "finish": FinishReason.STOP,
    }
    return RequestRecord(**(values | fields))


class Open:
    """A whole server: the gRPC port, the ports for operators, and what is behind them."""

    def __init__(self, running: Running, house: House, web: HttpServer) -> None:
        self.run = running
        self.house = house
        self.api = f"http://127.0.0.1:{web.port}"  # what clients of OpenAI's API call

    @property
    def http(self) -> str:
        return self.house.addresses()[0].split()[1].removesuffix("/dashboard,")

    @property
    def admin(self) -> str:
        return self.house.addresses()[-1].removeprefix("administration on ")


@contextlib.asynccontextmanager
async def opened(
    options: OpsOptions, script: Script = echo, host: str = "127.0.0.1", **engine_options: Any
) -> AsyncIterator[Open]:
    """As nitsum-serve does it, around a fake engine."""
    house = House(options, DEFAULT_TIERS, host)
    server = GrpcServer(
        host, 0, guard=house.guard(), tls=house.tls, state=house.state, profiler=house.desk.profiler, keys=house.keys
    )  # fmt: skip
    web = HttpServer(build_app(house.state, ops_routes(house.desk), house.protected), host, 0, house.tls_context())
    await server.start()
    await web.start()
    await house.start()
    bridge = Bridge(asyncio.get_running_loop())
    engine = FakeEngine(bridge.sink, script, admitted=bridge.admitted, **engine_options)
    try:
        backend = house.open(engine, served_model(), bridge)
        await server.serve(backend)
        await house.serve(backend)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            yield Open(Running(server, engine, bridge, channel, stub), house, web)
    finally:
        await server.stop()
        await house.stop()
        await web.stop()
        engine.close()
