"""The ports of one server process beside its main gRPC port, and all that stands before and behind them."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.types import ASGIApp

import nitsum_jax
from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.runtime.backend import Backend, ServedModel, ServingEngine
from nitsum_jax.runtime.control.control_loop import ControlLoop
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.address import callable_host, target
from nitsum_jax.server.grpc.server import GrpcServer, in_thread
from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.launch.ops_flags import LOOPBACK, OpsOptions
from nitsum_jax.server.operations.monitor import Operations
from nitsum_jax.server.operations.profiling import Profiler
from nitsum_jax.server.operations.routes import OperatorViews, ops_routes
from nitsum_jax.server.operations.tracing import RequestTracer, otlp_tracer
from nitsum_jax.server.security.guard import AccessPolicy, Guard
from nitsum_jax.server.security.http_guard import HttpGuard
from nitsum_jax.server.security.key_file import KeyFile
from nitsum_jax.server.security.limits import Limits
from nitsum_jax.server.state import ServerState

_LAST_TRACES_S = 3.0


class ServerPorts:
    """Makes guards and ports as the flags say; one per process.

    Attributes:
      state: shared by all front ends.
      views: what the routes for operators look at; an HTTP application mounts `ops_routes(ports.views)`.
      tls: for every port.
      keys: of the callers; None: they are not asked.
    """

    def __init__(self, options: OpsOptions, tiers: TierSet, host: str) -> None:
        """Reads the keys; binds nothing.

        Args:
          options: from the flags.
          tiers: of the server: the keys may name these.
          host: of the main ports. Administration without keys is offered there only if no other machine can come in.

        Raises:
          InvalidInputError: the file of keys is wrong.
          PreconditionError: traces are asked for, and OpenTelemetry is not installed.
        """
        self.state = ServerState()
        self.views = OperatorViews(self.state, Profiler(options.profile_dir), names=options.metrics_names)
        self.tls = options.tls
        self._options = options
        self._tiers = tiers
        self._host = host
        self.keys = None if options.api_keys is None else KeyFile(options.api_keys, tiers.names)
        self._limits = Limits(time.monotonic)
        self._admin: GrpcServer | None = None
        self._http: HttpServer | None = None
        self._feeding: asyncio.Task[None] | None = None
        self._control: ControlLoop | None = None
        if options.otlp_endpoint is not None:  # reported before the model is loaded
            otlp_tracer(options.otlp_endpoint, "", "").close()

    def guard(self) -> Guard:
        """For a main port."""
        safe = self.keys is not None or self._host in LOOPBACK
        return self._guard(admin=safe and self._options.admin_port is None)

    def protected(self, app: ASGIApp) -> ASGIApp:
        """An HTTP application behind the guard of the main ports."""
        return HttpGuard(app, self.guard())

    def tls_context(self) -> ssl.SSLContext | None:
        """For an HTTP port; None: no encryption."""
        return None if self.tls is None else self.tls.ssl_context()

    async def start(self) -> None:
        """Opens the ports for operators, while the model is still being loaded.

        Raises:
          InvalidInputError: a host is not an address of this machine.
          PreconditionError: a port is in use or not allowed.
        """
        options = self._options
        if options.admin_port is not None:
            self._admin = GrpcServer(
                options.admin_host,
                options.admin_port,
                guard=self._guard(admin=True),
                tls=self.tls,
                state=self.state,
                profiler=self.views.profiler,
                keys=self.keys,
            )
            await self._admin.start()
        if options.metrics_port is not None:
            app = self.protected(Starlette(routes=ops_routes(self.views)))
            self._http = HttpServer(app, self._host, options.metrics_port, self.tls_context(), flag="metrics_port")
            await self._http.start()

    def open(
        self,
        engine: ServingEngine,
        model: ServedModel,
        router: StreamRouter,
        control: Callable[[ServingEngine, LayoutLog], ControlLoop] | None = None,
        tiers: TierSet | None = None,
        forecasts: Callable[[], Sequence[TierForecast]] | None = None,
    ) -> Backend:
        """The model is loaded: begins to watch, and returns what the front ends serve.

        Args:
          engine: as it is; the front ends get it guarded.
          model: of the engine.
          router: between them.
          control: makes the controller of the engine; None: there is none.
          tiers: with targets that are known by now; None: as they were.
          forecasts: asked on the engine's thread what a request of each tier would get; None: nobody knows.
        """
        tiers = tiers or self._tiers
        tracer: RequestTracer | None = None
        if self._options.otlp_endpoint is not None:
            tracer = otlp_tracer(self._options.otlp_endpoint, model.name, nitsum_jax.__version__)
        operations = Operations(
            engine, model.name, tiers, router, tracer=tracer, phase=lambda: self.state.phase, forecasts=forecasts
        )
        self.views.operations = operations
        self._feeding = asyncio.create_task(operations.feed.run())
        if control is not None:
            self._control = control(engine, operations.layout_log)
            self._control.start()
        return Backend(operations.front, model, router, self._control)

    async def serve(self, backend: Backend) -> None:
        """The main port serves: the admin port does so, too."""
        if self._admin is not None:
            await self._admin.serve(backend)

    async def stop(self) -> None:
        """Closes the ports, ends what watches."""
        operations = self.views.operations
        control, self._control = self._control, None
        if control is not None:
            await in_thread(control.close)
        if operations is not None:
            await operations.feed.close()
        if self._feeding is not None:
            self._feeding.cancel()
            await asyncio.wait({self._feeding})
        for server in (self._http, self._admin):
            if server is not None:
                await server.stop()
        self._http = self._admin = None
        if operations is not None:
            with contextlib.suppress(TimeoutError):  # a collector that does not answer must not hold up the end
                async with asyncio.timeout(_LAST_TRACES_S):
                    await in_thread(operations.close)

    def addresses(self) -> list[str]:
        """Lines for people: where the ports for operators are."""
        lines = []
        if self._http is not None:
            scheme = "http" if self.tls is None else "https"
            where = f"{scheme}://{target(callable_host(self._host), self._http.port)}"
            lines.append(f"dashboard {where}/dashboard, metrics {where}/metrics")
        if self._admin is not None:
            lines.append(f"administration on {target(callable_host(self._admin.host), self._admin.port)}")
        return lines

    def _guard(self, *, admin: bool) -> Guard:
        options = self._options
        ring = None if self.keys is None else self.keys.ring
        policy = AccessPolicy(ring, admin, options.streams_per_client, options.behind_gateway)
        return Guard(policy, limits=self._limits, on_refused=self._refused)

    def _refused(self, reason: str) -> None:
        if self.views.operations is not None:
            self.views.operations.denied(reason)
