"""nitsum-serve: binds the port, loads the model, serves, drains."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nitsum_jax.control.planning.decision import PlannerConfig
from nitsum_jax.control.tiers import DEFAULT_TIERS, TierSet, read_tiers
from nitsum_jax.engine.request import TokenDelta
from nitsum_jax.errors import NitsumError, one_line
from nitsum_jax.runtime.backend import ServedModel, ServingEngine
from nitsum_jax.runtime.control.layout_log import LayoutLog
from nitsum_jax.runtime.startup.served_model import served_model
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server import cli
from nitsum_jax.server.address import callable_host, target
from nitsum_jax.server.grpc.server import GrpcServer, in_thread
from nitsum_jax.server.launch.flags import LaunchOptions, read_options
from nitsum_jax.server.launch.ports import ServerPorts
from nitsum_jax.server.operations import logs
from nitsum_jax.server.operations.routes import ops_routes

if TYPE_CHECKING:
    from nitsum_jax.control.scheduling.forecast import TierForecast
    from nitsum_jax.engine.batching.pacing import Pace
    from nitsum_jax.models.loading import OpenModel
    from nitsum_jax.runtime.control.control_loop import ControlLoop
    from nitsum_jax.runtime.startup.scheduled_engine import Scheduled
    from nitsum_jax.server.http.server import HttpServer
    from nitsum_jax.server.security.key_file import KeyFile

_NAME = "nitsum-serve"
_LOG_EVERY_S = 10.0  # lines about compiling where stderr is a log
AUTO = "auto"  # what --tiers says instead of a file, for targets that the machine can keep
_LOG = logging.getLogger(__name__)

Sink = Callable[[Sequence[TokenDelta]], None]
Admitted = Callable[[str, float], None]
Load = Callable[[LaunchOptions, Sink, Admitted], "Loaded"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What loading came to.

    Attributes:
      engine: as it is.
      model: that it serves.
      scheduled: its scheduling, if it schedules by tiers itself.
      forecasts: asked on its thread what a request of each tier would get; None: nobody knows.
      pace: of other hardware, at which tokens come; None: they come at their own.
    """

    engine: ServingEngine
    model: ServedModel
    scheduled: "Scheduled | None" = None
    forecasts: "Callable[[], Sequence[TierForecast]] | None" = None
    pace: "Pace | None" = None


def run() -> None:
    """Entry point of the console script."""
    # Not sys.exit: a thread inside the compiler does not survive the end of the interpreter, and takes it down aloud.
    leave(main(sys.argv))


def main(argv: Sequence[str], load: Load | None = None, name: str = _NAME) -> int:
    """Runs the server until a signal ends it, and returns its exit status.

    Args:
      argv: the command line.
      load: what makes engine and model of the options; the real ones if None.
      name: of the tool, for its messages.
    """
    debug = False
    try:
        options = read_options(argv)
        debug = options.log_level == "debug"
        logs.configure(options.log_level, options.ops.log_format)
        return asyncio.run(serve(options, load or load_engine, name))
    except (cli.HelpRequested, NitsumError) as why:
        return cli.ended(name, why)
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    except Exception as error:
        if debug:
            _LOG.exception("failed")
        where = "" if debug else " (--log_level=debug shows where)"
        cli.err(f"{name}: unexpected {type(error).__name__}: {one_line(str(error))}{where}")
        return cli.EXIT_FAILED


def tiers_of(options: LaunchOptions) -> TierSet:
    """The tiers that the flags name; their targets are those of the paced target, if there is one.

    With --tiers=auto they may become longer once the machine is known (`Scheduled.tiers`).

    Raises:
      InvalidInputError: their file is wrong.
    """
    return DEFAULT_TIERS if options.tiers in (None, AUTO) else read_tiers(options.tiers)


def load_engine(options: LaunchOptions, sink: Sink, admitted: Admitted) -> Loaded:
    """Opens the model and starts an engine on it; takes as long as loading and compiling take.

    Args:
      options: what the flags say.
      sink: takes the deltas of every step.
      admitted: called with every request that leaves the queue, and when.

    Raises:
      NitsumError: model, devices, layout or memory do not fit what was asked for.
    """
    # Here rather than at the top: they bring in JAX, and a port in use should be reported without that delay.
    from nitsum_jax.engine.config import EngineConfig
    from nitsum_jax.meshes.devices import emulate_cpu_devices
    from nitsum_jax.meshes.memory import spare_the_collector
    from nitsum_jax.models.loading import open_model
    from nitsum_jax.runtime.progress import ProgressLine, StartProgress
    from nitsum_jax.runtime.startup.compile_cache import enable
    from nitsum_jax.runtime.startup.scheduled_engine import start_scheduled

    enable(options.cache_dir)
    tiers = tiers_of(options)
    config = EngineConfig(**options.engine, tier_names=tiers.names)
    if config.devices is not None:
        emulate_cpu_devices(config.devices)
    model = open_model(options.model)
    line = ProgressLine(_NAME)
    started = start_scheduled(
        model,
        config,
        tiers,
        sink,
        admitted=admitted,
        profile=options.profile,
        pace=options.pace,
        time_scale=options.time_scale,
        find_reach=True,
        stretch=options.tiers == AUTO,
        on_progress=StartProgress(line, plain_every_s=_LOG_EVERY_S),
    )
    line.clear()
    spare_the_collector()
    return Loaded(started.engine, served_of(options, model), started, started.scheduling.forecasts, started.pace)


def served_of(options: LaunchOptions, model: "OpenModel") -> ServedModel:
    """The model as front ends need it, by all flags that say something of that.

    Raises:
      InvalidInputError: its generation config cannot be used.
    """
    return served_model(
        model,
        options.served_model_name,
        options.generation_config,
        tool_parser=options.tool_parser,
        reasoning_parser=options.reasoning_parser,
        pooling=options.engine["pooling"],
    )


async def serve(options: LaunchOptions, load: Load, name: str, signals: "StopSignals | None" = None) -> int:
    """Serves until it is told to stop; returns the exit status.

    Args:
      options: of the flags.
      load: makes engine and model of them.
      name: of the tool, for its messages.
      signals: tell it to stop; None: SIGTERM and SIGINT, and SIGHUP has the keys read again.
    """
    if signals is None:
        signals = StopSignals(asyncio.get_running_loop())
        signals.handle()
    ports = ServerPorts(options.ops, tiers_of(options), options.host)
    server = GrpcServer(
        options.host,
        options.port,
        guard=ports.guard(),
        tls=ports.tls,
        state=ports.state,
        profiler=ports.views.profiler,
        keys=ports.keys,
    )
    if ports.keys is not None and signals.handled:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, ports.keys)
    http = _http(options, ports)
    await server.start()
    if http is not None:
        await http.start()
    cli.out(f"loading {options.model}; {_address(server)} answers health checks meanwhile")
    try:
        await ports.start()
        router = StreamRouter(asyncio.get_running_loop())
        loading = asyncio.create_task(in_thread(lambda: load(options, router.sink, router.admitted)))
        await _first(loading, signals.first)
        if not loading.done():
            cli.err(f"{name}: stopped while starting")
            await _stop(server, http, ports)
            leave(cli.EXIT_OK)
        loaded = await loading
        scheduled = loaded.scheduled
        tiers = None if scheduled is None else scheduled.tiers
        backend = ports.open(
            loaded.engine, loaded.model, router, controller_of(options, scheduled), tiers, loaded.forecasts
        )
        backend = dataclasses.replace(backend, pace=loaded.pace)
        await server.serve(backend)
        await ports.serve(backend)
        _announce(server, http, loaded, ports, options)
        await signals.first
        return await _end(server, http, ports, loaded.engine, signals, options.drain_s, name)
    finally:
        await _stop(server, http, ports)


def controller_of(
    options: LaunchOptions, scheduled: "Scheduled | None"
) -> "Callable[[ServingEngine, LayoutLog], ControlLoop] | None":
    """What makes the controller of a cell; None without scheduling by tiers."""
    if scheduled is None:
        return None
    from nitsum_jax.runtime.control.control_loop import ControlLoop
    from nitsum_jax.runtime.control.decision_log import DecisionLog

    control, tiers = options.control, scheduled.tiers

    def make(engine: ServingEngine, layout_log: LayoutLog) -> ControlLoop:
        return ControlLoop(
            engine,
            scheduled.scheduling,
            scheduled.cost,
            tiers,
            layout_log,
            mode=control.mode,
            config=control.config(),
            planner=PlannerConfig(tps=scheduled.planned_tps()),
            log=None if control.log is None else DecisionLog(control.log),
            timeout_s=control.timeout_s,
        )

    return make


def _http(options: LaunchOptions, ports: ServerPorts) -> "HttpServer | None":
    """The HTTP server beside the gRPC server, if there is to be one."""
    if options.http_port is None:
        return None
    # Here rather than at the top: a server without HTTP need not wait for its libraries.
    from nitsum_jax.server.http.app import build_app
    from nitsum_jax.server.http.server import HttpServer

    app = build_app(ports.state, ops_routes(ports.views), ports.protected)
    return HttpServer(app, options.host, options.http_port, ports.tls_context())


async def _stop(server: GrpcServer, http: "HttpServer | None", ports: ServerPorts) -> None:
    """Ends all front ends; open calls get the error that the server stops."""
    stopping = [server.stop(), ports.stop()] if http is None else [server.stop(), ports.stop(), http.stop()]
    await asyncio.gather(*stopping)


async def _end(
    server: GrpcServer,
    http: "HttpServer | None",
    ports: ServerPorts,
    engine: ServingEngine,
    signals: "StopSignals",
    drain_s: float,
    name: str,
) -> int:
    """From the first signal to the exit status."""
    cli.err(f"{name}: finishing running requests (at most {drain_s:g} s; a second signal stops at once)")
    draining = asyncio.create_task(server.drain(drain_s))
    await _first(draining, signals.second)
    if not draining.done():
        await _stop(server, http, ports)
        cli.err(f"{name}: stopped at once")
        leave(128 + signals.second.result())
    if not await draining:
        cli.err(f"{name}: --drain_seconds passed: the requests that were still alive are cut off")
    await _stop(server, http, ports)
    closing = asyncio.create_task(in_thread(engine.close))
    await _first(closing, signals.second)
    if not closing.done():
        leave(128 + signals.second.result())
    await closing
    return cli.EXIT_OK


class StopSignals:
    """The first and the second SIGTERM or SIGINT, as futures of the signal's number."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first: asyncio.Future[int] = loop.create_future()
        self.second: asyncio.Future[int] = loop.create_future()
        self.handled = False
        self._loop = loop

    def handle(self) -> None:
        """From now on they are those of the process; on its main thread."""
        self.handled = True
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self.note, int(number))

    def note(self, number: int) -> None:
        """One has come; on the event loop."""
        waiting = next((future for future in (self.first, self.second) if not future.done()), None)
        if waiting is not None:
            waiting.set_result(number)


def _reload(keys: "KeyFile") -> None:
    """At SIGHUP."""
    with contextlib.suppress(NitsumError):  # it has been logged, and no caller waits for an answer
        keys.reload()


async def _first(task: asyncio.Future[Any], stop: asyncio.Future[Any]) -> None:
    """Waits until the work is done or the signal has come."""
    await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)


def leave(status: int) -> NoReturn:
    """Ends the process without waiting for a thread that compiles or computes: it cannot be interrupted."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _announce(
    server: GrpcServer, http: "HttpServer | None", loaded: Loaded, ports: ServerPorts, options: LaunchOptions
) -> None:
    engine, model = loaded.engine, loaded.model
    cli.out(engine.memory_report)
    if options.pace is not None:
        cli.out(
            f"PACED: tokens come at the pace of {options.pace}, {options.time_scale:g} real seconds for a second "
            "of that cell; no time or rate below describes this machine"
        )
    base = None
    if http is not None:
        base = f"{'http' if ports.tls is None else 'https'}://{target(callable_host(http.host), http.port)}"
        cli.out(f"OpenAI-compatible HTTP: {base}/v1")
    for line in ports.addresses():
        cli.out(line)
    if model_says := str(model.defaults):
        cli.out(f"defaults of the model: {model_says} (--generation_config=none ignores them)")
    if loaded.scheduled is not None:
        for line in _of_tiers(loaded.scheduled, options.tiers == AUTO):
            cli.out(line)
    if options.control.mode != "off":
        cli.out(f"planner {options.control.mode}: a decision every {options.control.interval_s:g} s at the latest")
    where = _address(server)
    cli.out(f"{model.name} is ready on {where}, layout {engine.layout()}. In another terminal:")
    chat = "--chat " if model.render_chat is not None else ""
    safe = "" if ports.tls is None else f"--tls_ca={shlex.quote(str(ports.tls.cert))} "
    cli.out(f'{_client_command()} --server={where} {safe}{chat}--prompt="Why is the sky blue?" --max_tokens=64')
    if base is not None:
        cli.out(f"Dashboard: {base}/dashboard")


def _of_tiers(scheduled: "Scheduled", auto: bool) -> list[str]:
    """What there is to say of targets: those that were found, and those that cannot be kept."""
    from nitsum_jax.runtime.scheduling.reach import unkept

    if scheduled.reach is None:
        return []
    found = []
    if auto:
        targets = ", ".join(f"{tier.name} {tier.ttft_ms:g} / {tier.tpot_ms:g}" for tier in scheduled.tiers)
        found = [f"tiers (TTFT / TPOT in ms; --tiers=auto): {targets}"]
    return found + unkept(scheduled.tiers, scheduled.reach)


def _address(server: GrpcServer) -> str:
    return target(callable_host(server.host), server.port)


def _client_command() -> str:
    """nitsum-generate as this installation has it: by its bare name only if a shell finds the same one."""
    beside = Path(sys.executable).parent / "nitsum-generate"
    found = shutil.which("nitsum-generate")
    if beside.is_file():
        if found is not None and os.path.samefile(found, beside):
            return "nitsum-generate"
        relative = os.path.relpath(beside)
        return shlex.quote(str(beside) if relative.startswith("..") else relative)
    return f"{shlex.quote(sys.executable)} -m nitsum_jax.server.client.generate"


if __name__ == "__main__":
    run()
