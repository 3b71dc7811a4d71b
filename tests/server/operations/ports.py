"""A fake engine watched by Operations, with records made by hand or by real calls, for tests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio

from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.grpc.server import GrpcServer
from nitsum_jax.server.http.app import build_app
from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.launch.ports import ServerPorts
from nitsum_jax.server.operations.routes import ops_routes
from nitsum_jax.server.proto import nitsum_pb2_grpc
from tests.server.fake_engine import FakeEngine, Script
from tests.server.harness import Running, echo, served_model


def record(**fields: Any) -> ServedRequest:
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
    return ServedRequest(**(values | fields))


class Open:
    """A whole server: the gRPC port, the ports for operators, and what is behind them."""

    def __init__(self, running: Running, ports: ServerPorts, web: HttpServer) -> None:
        self.run = running
        self.ports = ports
        self.api = f"http://127.0.0.1:{web.port}"  # what clients of OpenAI's API call

    @property
    def http(self) -> str:
        return self.ports.addresses()[0].split()[1].removesuffix("/dashboard,")

    @property
    def admin(self) -> str:
        return self.ports.addresses()[-1].removeprefix("administration on ")


@contextlib.asynccontextmanager
async def opened(
    options: OpsOptions,
    script: Script = echo,
    host: str = "127.0.0.1",
    forecasts: Callable[[], Sequence[TierForecast]] | None = None,
    make: type[FakeEngine] = FakeEngine,
    pooling: Pooling | None = None,
    **engine_options: Any,
) -> AsyncIterator[Open]:
    """As nitsum-serve does it, around a fake engine."""
    ports = ServerPorts(options, DEFAULT_TIERS, host)
    server = GrpcServer(
        host, 0, guard=ports.guard(), tls=ports.tls, state=ports.state, profiler=ports.views.profiler, keys=ports.keys
    )  # fmt: skip
    web = HttpServer(build_app(ports.state, ops_routes(ports.views), ports.protected), host, 0, ports.tls_context())
    await server.start()
    await web.start()
    await ports.start()
    router = StreamRouter(asyncio.get_running_loop())
    engine = make(router.sink, script, admitted=router.admitted, **engine_options)
    try:
        backend = ports.open(engine, served_model(pooling=pooling), router, forecasts=forecasts)
        await server.serve(backend)
        await ports.serve(backend)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            yield Open(Running(server, engine, router, channel, stub), ports, web)
    finally:
        await server.stop()
        await ports.stop()
        await web.stop()
        engine.close()
