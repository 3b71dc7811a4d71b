"""The cluster as a Ray Serve application: `serve run nitsum_jax.cluster.app:build model=... cells=2`, and config files.

The front door is a deployment, too: one replica, which opens the ports of nitsum-cluster in its own process.  Arguments
are the flags of nitsum-cluster without the dashes.
"""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from nitsum_jax.cluster import flags
from nitsum_jax.cluster.on_ray.deployment import cell_deployment
from nitsum_jax.cluster.on_ray.ray_cluster import resource_of
from nitsum_jax.errors import NitsumError, UnavailableError, one_line

_STOP_S = 30.0


class FrontDoor:
    """The ports, on an event loop of their own; see `server.launch.main.serve`."""

    def __init__(self, argv: Sequence[str], cells: "DeploymentHandle[Any]") -> None:
        """Opens the ports; they answer with UNAVAILABLE until a cell serves."""
        from nitsum_jax.server.launch.main import StopSignals

        self._options = flags.read(argv)
        self._cells = cells
        self._error: BaseException | None = None
        self._signals: StopSignals | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="nitsum-front", daemon=True)
        self._thread.start()

    async def __call__(self, request: Any = None) -> dict[str, Any]:
        """Where the ports are, for who asks Serve's own proxy."""
        serve_options = self._options.serve
        return {"host": serve_options.host, "grpc": serve_options.port, "http": serve_options.http_port}

    def check_health(self) -> None:
        """Raises if the ports are closed: Serve then starts another front door."""
        if not self._thread.is_alive():
            why = "it has ended" if self._error is None else one_line(str(self._error))
            raise RuntimeError(f"the front door is closed: {why}")

    def __del__(self) -> None:
        loop, signals = self._loop, self._signals
        if loop is not None and signals is not None and self._thread.is_alive():
            loop.call_soon_threadsafe(signals.note, 15)
            self._thread.join(_STOP_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except (NitsumError, OSError) as error:
            self._error = error

    async def _serve(self) -> None:
        from nitsum_jax.server.launch.main import StopSignals, serve

        self._loop = asyncio.get_running_loop()
        self._signals = StopSignals(self._loop)
        await serve(self._options.serve, self._load, "nitsum-cluster", self._signals)

    def _load(self, launch: Any, sink: Any, admitted: Any) -> Any:
        from nitsum_jax.cluster.main import engine_of, follow, loaded, model_of

        model = model_of(launch)
        engine = engine_of(self._options, launch, model.name, sink, admitted)
        follow(engine, self._cells)
        if not engine.wait_for_cells(1, self._options.start_s):
            engine.close()
            raise UnavailableError(f"no cell served within {self._options.start_s:g} s: see the logs of Ray Serve")
        return loaded(engine, model, launch)


def build(args: Mapping[str, Any]) -> serve.Application:
    """Makes the application.

    Args:
      args: flags of nitsum-cluster, such as {"model": "smollm2-135m", "cells": 2, "http_port": 8000}.

    Raises:
      InvalidInputError: a flag is wrong.
      PreconditionError: the cluster has fewer devices than the cells need.
    """
    import ray

    argv = ("nitsum-cluster", *(f"--{name}={value}" for name, value in args.items()))
    options = flags.read(argv)
    cells = cell_deployment(options, resource_of(options, ray.cluster_resources()))
    front = serve.deployment(name="FrontDoor", num_replicas=1, ray_actor_options={"num_cpus": 0})(FrontDoor)
    return front.bind(argv, cells)
