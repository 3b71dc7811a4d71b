"""Ray around the cells: started or joined, asked for room, told to deploy, and ended."""

import contextlib
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc

from nitsum_jax.cluster.flags import ClusterOptions
from nitsum_jax.cluster.messages import FAILED
from nitsum_jax.errors import PreconditionError, UnavailableError, one_line
from nitsum_jax.server import cli
from nitsum_jax.server.address import DEFAULT_HOST

APP = "nitsum"
_MISSING = "Ray is not installed: install the extra, as in pip install 'nitsum-jax[ray]'"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_REACH_S = 10.0
_JOIN_S = 120.0
_POLL_S = 0.25


def prepare(options: ClusterOptions) -> None:
    """Finds out what can be known before Ray and a model are loaded; before `connect`.

    Raises:
      PreconditionError: nobody listens at the address, or Ray is not installed.
    """
    if options.address is None:
        # Ray reads this when it is imported. It has a mode in which its processes listen on the loopback address only,
        # and this is the name of the switch on Linux, too; else it replaces 127.0.0.1 by an address of the machine.
        os.environ.setdefault(_LOOPBACK, "0")
        # Ray gives its workers the niceness of work in the background, 15; a cell would wait for all else that runs.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        with _joining(options.address):
            _reach(options.address)
        if _only_loopback(options.address):
            os.environ.setdefault(_LOOPBACK, "0")
    if not options.ray_usage:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        import ray.serve  # noqa: F401
    except ImportError:
        raise PreconditionError(_MISSING) from None


def connect(options: ClusterOptions) -> None:
    """Joins the Ray cluster, or starts one on the loopback address; on a thread that lives as long as it.

    Raises:
      PreconditionError: the cluster at the address cannot be joined.
    """
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    common: dict[str, Any] = {
        "namespace": "nitsum",
        "log_to_driver": options.serve.log_level == "debug",
        "logging_level": logging.ERROR,
        "configure_logging": False,
    }
    if options.address is None:
        ray.init(
            num_cpus=max(4, os.cpu_count() or 1),
            include_dashboard=options.ray_dashboard,
            dashboard_host=DEFAULT_HOST,
            _node_ip_address=DEFAULT_HOST,
            **common,
        )
        return
    with _joining(options.address), _not_for_ever(options.address):
        ray.init(address=options.address, **common)


@contextlib.contextmanager
def _joining(address: str) -> Iterator[None]:
    """What goes wrong there, in a line that says what to do."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise PreconditionError(
            f"there is no Ray cluster at --address={address} ({one_line(str(error), 160)}): start one with "
            "ray start --head, or leave the flag out"
        ) from None


def _reach(address: str) -> None:
    """Ray waits for minutes where nobody listens, or somebody else does.

    Raises:
      OSError: nobody does, or it is no gRPC server, as Ray's are.
    """
    place = address.removeprefix("ray://")
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():  # what else an address can be, such as auto, Ray knows
        return
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    with grpc.insecure_channel(place, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_REACH_S)
        except grpc.FutureTimeoutError:
            raise OSError("what listens there is not Ray") from None


def resource_of(options: ClusterOptions, total: Mapping[str, float]) -> str | None:
    """What a cell takes of the cluster: "GPU", "TPU", or None where its devices are emulated.

    Args:
      options: of the cluster.
      total: resources of the cluster.

    Raises:
      PreconditionError: there are accelerators, but fewer than the cells need.
    """
    kind = next((name for name in ("GPU", "TPU") if total.get(name, 0) >= 1), None)
    if kind is None:
        return None
    each, there = options.devices_per_cell or 1, int(total[kind])
    if options.cells * each > there:
        raise PreconditionError(
            f"{options.cells} cells of {each} devices need {options.cells * each} {kind}s, and the cluster has {there}"
            ": lower --cells or --devices_per_cell, or add nodes"
        )
    return kind


def _only_loopback(address: str) -> bool:
    """Whether a Ray listens on the loopback address alone, where Ray would look for it at the machine's own."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host not in ("127.0.0.1", "localhost", "[::1]") or not port.isdigit():
        return False
    with contextlib.suppress(OSError):
        socket.create_connection((_own_address(), int(port)), timeout=_REACH_S).close()
        return False
    return True


def _own_address() -> str:
    """Of this machine; raises OSError if it has none but the loopback one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.connect(("192.0.2.1", 9))  # nothing is sent: the system only says by which address it would go
        return str(asked.getsockname()[0])


@contextlib.contextmanager
def _not_for_ever(address: str) -> Iterator[None]:
    """Ray tries again without end to join one that has gone meanwhile, and cannot be interrupted: the process ends."""

    def give_up() -> None:
        sys.stderr.write(f"nitsum-cluster: Ray at --address={address} lets nobody join: look at ray status\n")
        sys.stderr.flush()
        os._exit(cli.EXIT_UNAVAILABLE)

    timer = threading.Timer(_JOIN_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Deployed:
    """The cells of this process's cluster."""

    def __init__(self, options: ClusterOptions) -> None:
        """Deploys them; see `wait`."""
        import ray
        from ray import serve

        from nitsum_jax.cluster.on_ray.deployment import cell_deployment

        self._options = options
        self._resource = resource_of(options, ray.cluster_resources())
        self._make = cell_deployment
        with quiet():
            serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        self.deploy(options)

    def deploy(self, options: ClusterOptions) -> None:
        """Deploys, or changes what is deployed: cells are added, replaced one after the other, or taken away."""
        from ray import serve
        from ray.serve.api import RunTarget

        target = RunTarget(self._make(options, self._resource), name=APP, route_prefix=None)
        with quiet():
            (self.handle,) = serve.run_many(
                [target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False
            )

    def wait(self, ready: Callable[[float], bool], timeout_s: float) -> None:
        """Waits until the cells serve.

        Args:
          ready: waits for so many seconds, and says whether they do.
          timeout_s: most seconds.

        Raises:
          PreconditionError: a cell cannot start; the line is the cell's.
          UnavailableError: they did not start in time.
        """
        end = time.monotonic() + timeout_s
        while not ready(_POLL_S):
            if (why := self.failure()) is not None:
                raise PreconditionError(f"a cell cannot start: {why}")
            if time.monotonic() > end:
                raise UnavailableError(
                    f"the cells did not start within {timeout_s:g} s: give a longer --start_seconds, or look at the "
                    "logs of Ray Serve"
                )

    def failure(self) -> str | None:
        """Why a cell cannot start, one line; None while none has failed."""
        from ray import serve

        app = serve.status().applications.get(APP)
        messages = [] if app is None else [app.message, *(one.message for one in app.deployments.values())]
        return next((why for text in messages if (why := reason_in(text)) is not None), None)

    def close(self) -> None:
        """Ends the cells, and Ray if it was started here."""
        import ray
        from ray import serve

        if not ray.is_initialized():  # it has gone; what is asked of Serve now would start another
            return
        with contextlib.suppress(Exception), quiet():
            if self._options.address is None:
                serve.shutdown()
            else:
                serve.delete(APP)
        ray.shutdown()


def reason_in(text: str) -> str | None:
    """The line of a cell that cannot start, in what Serve says of it; None if it says nothing of the kind."""
    found = re.search(rf"{re.escape(FAILED)}([^\n]+)", text or "")
    if found is not None:
        return one_line(found[1].replace("\\n", " ").strip())
    if "failed to start" in (text or ""):
        last = [line.strip() for line in text.splitlines() if re.match(r"^\s*\w*(Error|Exception)\b", line)]
        return one_line(last[-1]) if last else None
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Serve tells its progress at INFO, whatever the log level of this process."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
