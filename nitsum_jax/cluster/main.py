"""nitsum-cluster: cells on Ray behind the front door of nitsum-serve."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nitsum_jax.cluster import flags
from nitsum_jax.cluster.flags import ClusterOptions
from nitsum_jax.errors import NitsumError
from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.server import cli
from nitsum_jax.server.launch import main as server
from nitsum_jax.server.launch.flags import LaunchOptions
from nitsum_jax.server.launch.main import AUTO, Admitted, Loaded, Sink, served_of, tiers_of

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

    from nitsum_jax.cluster.front import ClusterEngine

_NAME = "nitsum-cluster"


def run() -> None:
    """Entry point of the console script."""
    server.leave(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs the cluster until a signal ends it, and returns the exit status."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else gRPC tells of every process that Ray starts
    try:
        options = flags.read(argv)
        from nitsum_jax.cluster.on_ray.ray_cluster import connect, prepare

        prepare(options)
        # First, so that a model that cannot be opened is told without waiting for a cell that tries to.
        model = model_of(options.serve)
        # On the main thread: the processes that Ray starts end with the thread that started them.
        connect(options)
    except (cli.HelpRequested, NitsumError) as why:
        return cli.ended(_NAME, why)
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    return server.main(options.cell_argv, functools.partial(load_cluster, options, model), name=_NAME)


def load_cluster(
    options: ClusterOptions, model: ServedModel, launch: LaunchOptions, sink: Sink, admitted: Admitted
) -> Loaded:
    """Deploys the cells and waits until they serve; Ray is connected.

    Args:
      options: of the cluster.
      model: as the front door needs it.
      launch: of the front door.
      sink: takes the deltas.
      admitted: called with every request that an instance takes.

    Raises:
      NitsumError: no room, or a cell that cannot start.
    """
    from nitsum_jax.cluster.on_ray import ray_cluster

    deployed = ray_cluster.Deployed(options)
    engine = engine_of(options, launch, model.name, sink, admitted, deployed.close)
    try:
        follow(engine, deployed.handle)
        deployed.wait(lambda seconds: engine.wait_for_cells(options.cells, seconds), options.start_s)
    except BaseException:
        engine.close()
        raise
    return loaded(engine, model, launch)


def loaded(engine: "ClusterEngine", model: ServedModel, launch: LaunchOptions) -> Loaded:
    """What the front door serves."""
    from nitsum_jax.control.model.cost_model import CostModel
    from nitsum_jax.engine.batching.pacing import Pace
    from nitsum_jax.profiles.library import load_profile

    pace = None
    if launch.pace is not None:
        profile = load_profile(launch.pace)
        pace = Pace(CostModel(profile), profile.name, profile.kv_bytes_per_token, launch.time_scale)
    return Loaded(engine, model, forecasts=engine.forecasts, pace=pace)


def model_of(launch: LaunchOptions) -> ServedModel:
    """The model as the front door needs it: its tokenizer, and no weights."""
    from nitsum_jax.models.loading import open_model

    return served_of(launch, open_model(launch.model))


def engine_of(
    options: ClusterOptions,
    launch: LaunchOptions,
    model: str,
    sink: Sink,
    admitted: Admitted,
    on_close: Callable[[], None] | None = None,
) -> "ClusterEngine":
    """The engine of a front door, without cells yet."""
    from nitsum_jax.cluster.front import ClusterEngine

    return ClusterEngine(
        model,
        tiers_of(launch),
        sink,
        admitted,
        any_targets=launch.tiers == AUTO,
        time_scale=1.0 if launch.pace is None else launch.time_scale,
        silent_s=options.silent_s,
        on_close=on_close,
    )


def follow(engine: "ClusterEngine", handle: "DeploymentHandle[Any]") -> None:
    """Has the engine know the replicas of the deployment, now and from now on."""
    from nitsum_jax.cluster.on_ray.directory import DIRECTORY
    from nitsum_jax.cluster.on_ray.ray_cluster import quiet
    from nitsum_jax.cluster.on_ray.serve_calls import ServeCell

    if not handle.is_initialized:
        with quiet():
            handle._init()  # else Serve would make its router, which knows the replicas, with the first call
    DIRECTORY.listen(lambda names: engine.set_cells({name: ServeCell(name, handle) for name in names}))


if __name__ == "__main__":
    run()
