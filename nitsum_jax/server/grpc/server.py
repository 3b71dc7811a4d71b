"""The gRPC server around the service: address, health, reflection, and a life from bind to drain."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nitsum_jax.errors import PreconditionError
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.server.address import check_bindable, target
from nitsum_jax.server.grpc import admin_service
from nitsum_jax.server.grpc.admin_service import AdminService
from nitsum_jax.server.grpc.jetstream import SERVICE_NAME as JETSTREAM_NAME
from nitsum_jax.server.grpc.jetstream import JetStreamService
from nitsum_jax.server.grpc.service import SERVICE_NAME, GenerationService
from nitsum_jax.server.grpc.undecodable import UndecodableRequests
from nitsum_jax.server.operations.profiling import Profiler
from nitsum_jax.server.proto import admin_pb2_grpc, jetstream_pb2_grpc, nitsum_pb2_grpc
from nitsum_jax.server.security.grpc_guard import GrpcGuard
from nitsum_jax.server.security.guard import AccessPolicy, Guard
from nitsum_jax.server.security.key_file import KeyFile
from nitsum_jax.server.security.tls import TlsFiles
from nitsum_jax.server.state import ServerPhase, ServerState

MAX_MESSAGE_BYTES = 4 * 2**20
"""Longest request: about a million tokens of text, and what gRPC allows unless told otherwise."""

MAX_METADATA_BYTES = 32 * 2**10
"""All metadata of a call together; more is refused before any of it is looked at."""

_FLUSH_S = 5.0  # after the engine has finished all requests, their last messages get this long to reach the clients
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server would silently share the port
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", 30_000),  # finds clients that vanished without a word, so that their requests end
    ("grpc.keepalive_timeout_ms", 10_000),
)
_T = TypeVar("_T")


class GrpcServer:
    """One grpc.aio server: bound at once, NOT_SERVING until `serve`, and again from `drain` on."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        guard: Guard | None = None,
        tls: TlsFiles | None = None,
        state: ServerState | None = None,
        profiler: Profiler | None = None,
        keys: KeyFile | None = None,
    ) -> None:
        """Binds the port; call it on the event loop that will serve.

        Args:
          host: address of this machine.
          port: 0 takes a free one.
          guard: which caller may call what; None: all may call everything.
          tls: None: no encryption.
          state: shared with other ports of the same server; one of its own if None.
          profiler: for AdminService; None: there are no traces.
          keys: for AdminService, to read them again; None: there are none.

        Raises:
          InvalidInputError: `host` is not an address of this machine.
          PreconditionError: the port is in use or not allowed.
        """
        check_bindable(host, port)
        self.host = host
        self.state = state or ServerState()
        self._health = health.aio.HealthServicer()
        # The caller is checked before the message: strangers learn nothing about their messages.
        interceptors = [GrpcGuard(guard or Guard(AccessPolicy(admin=True))), UndecodableRequests()]
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=interceptors)
        nitsum_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(self.state), self._server)
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(JetStreamService(self.state), self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(
            AdminService(profiler or Profiler(None), self.state, keys), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (
            SERVICE_NAME,
            JETSTREAM_NAME,
            admin_service.SERVICE_NAME,
            health.SERVICE_NAME,
            reflection.SERVICE_NAME,
        )
        reflection.enable_server_reflection(names, self._server)
        try:
            where = target(host, port)
            self.port: int = (
                self._server.add_insecure_port(where)
                if tls is None
                else self._server.add_secure_port(where, tls.grpc_credentials())
            )
        except RuntimeError:  # taken since the check
            raise PreconditionError(f"port {port} on {host} is in use: give another --port") from None

    async def start(self) -> None:
        """Answers from now on: health checks with NOT_SERVING, everything else with UNAVAILABLE."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def serve(self, backend: Backend) -> None:
        """The engine is ready: takes requests, and says SERVING."""
        self.state.backend = backend
        self.state.ready_at = int(time.time())
        self.state.phase = ServerPhase.SERVING
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new requests and lets those that are alive finish, for at most `timeout_s` seconds.

        Returns:
          Whether all of them finished.
        """
        self.state.phase = ServerPhase.DRAINING
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        backend = self.state.backend
        if backend is None:
            return True
        finished = await in_thread(lambda: backend.engine.drain(timeout_s))
        flushed_by = time.monotonic() + _FLUSH_S
        while finished and backend.router.open_streams and time.monotonic() < flushed_by:
            await asyncio.sleep(0.01)
        return finished

    async def stop(self) -> None:
        """Ends what is still open (UNAVAILABLE to its clients) and frees the port. The engine is the caller's."""
        self.state.phase = ServerPhase.DRAINING
        if self.state.backend is not None:
            self.state.backend.router.cut_off()
        with contextlib.suppress(asyncio.CancelledError):
            await self._server.stop(None)

    async def _set_health(self, status: int) -> None:
        for name in ("", SERVICE_NAME, JETSTREAM_NAME):
            await self._health.set(name, status)


async def in_thread(work: Callable[[], _T]) -> _T:
    """Runs blocking work on a daemon thread of its own, so that not even the end of the process has to wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def settle(set_result: Callable[[], None]) -> None:
        if not done.cancelled():
            set_result()

    def run() -> None:
        report: Callable[[], None]
        try:
            result = work()
        except BaseException as error:
            failure = error
            report = lambda: done.set_exception(failure)  # noqa: E731
        else:
            report = lambda: done.set_result(result)  # noqa: E731
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
            loop.call_soon_threadsafe(settle, report)

    threading.Thread(target=run, name="nitsum-blocking", daemon=True).start()
    return await done
