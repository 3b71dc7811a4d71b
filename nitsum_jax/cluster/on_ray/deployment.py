"""Cells as replicas of a Ray Serve deployment."""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig

import nitsum_jax
from nitsum_jax.cluster.flags import ClusterOptions
from nitsum_jax.cluster.messages import FAILED, CellFacts
from nitsum_jax.control.routing.scaling import CellPressure, cells_wanted
from nitsum_jax.errors import NitsumError, one_line
from nitsum_jax.server.address import DEFAULT_HOST

if TYPE_CHECKING:
    from nitsum_jax.cluster.wire import CellAddress
    from nitsum_jax.engine.switching.switch import SwitchReport

CELL = "Cell"
_UNLIMITED = 100_000  # calls at once; the engine's queue is what is limited
_LEAVE_S = 30.0


class CellReplica:
    """One cell: `host.CellHost` in a process that Ray keeps.

    Every method but those for Serve itself begins with the name of the cell, by which calls find their replica.
    """

    # ruff: noqa: D102
    def __init__(self, argv: Sequence[str], report_s: float) -> None:
        # Here rather than at the top: Serve's controller imports this module, and has no use for JAX.
        from nitsum_jax.cluster.host import CellHost
        from nitsum_jax.cluster.wire import CellPort
        from nitsum_jax.server.launch.flags import read_options
        from nitsum_jax.server.operations import logs

        _stay_on_loopback()
        try:
            options = read_options(argv)
            logs.configure(options.log_level, options.ops.log_format)
            self._host = CellHost(serve.get_replica_context().replica_id.unique_id, options, report_s)
            self._port = CellPort(self._host, ray.util.get_node_ip_address())
        except NitsumError as error:
            raise RuntimeError(f"{FAILED}{one_line(str(error))}") from None

    async def facts(self, _cell: str) -> CellFacts:
        return await self._host.facts()

    async def listen(self, _cell: str) -> "CellAddress":
        return await self._port.open()

    async def set_layout(self, _cell: str, layout: str, prepare: bool) -> "SwitchReport":
        return await self._host.set_layout(layout, prepare)

    async def set_device(self, _cell: str, device: int, lost: bool) -> None:
        await self._host.set_device(device, lost)

    def record_routing_stats(self) -> dict[str, float]:
        """For calls that name no cell."""
        return {"streams": float(self._host.streams)}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `wanted_replicas`."""
        pressure = self._host.pressure()
        return {"pressure": pressure.pressure, "attainment": pressure.attainment}

    async def __del__(self) -> None:
        port, host = getattr(self, "_port", None), getattr(self, "_host", None)
        if port is not None:
            await port.leave()
        if host is not None:
            host.close()


def _stay_on_loopback() -> None:
    """Serve opens a port of every replica, for calls that we do not make, on all addresses of the machine.

    It has no setting for that, and opens it when the replica is made. Where all of Ray is on the loopback address, this
    port is, too.
    """
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() != DEFAULT_HOST or not hasattr(replica, "add_port_to_grpc_server"):
        return
    add = replica.add_port_to_grpc_server
    replica.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", DEFAULT_HOST))


def wanted_replicas(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Serve's autoscaling policy: see `control.routing.scaling`."""
    measured = context.aggregated_metrics or {}
    attainment = measured.get("attainment", {})
    pressures = [CellPressure(value, attainment.get(name, 1.0)) for name, value in measured.get("pressure", {}).items()]
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return cells_wanted(context.target_num_replicas, pressures, least, most), {}


def _version(options: ClusterOptions) -> str:
    """Differs where cells do: a change of their number is none of theirs.

    A replica tells of its load only if it was started with autoscaling.
    """
    told = (nitsum_jax.__version__, options.cell_argv, options.report_s, options.scales)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def cell_deployment(options: ClusterOptions, resource: str | None) -> serve.Application:
    """The deployment of the cells.

    Args:
      options: of the cluster.
      resource: that a cell takes `devices_per_cell` of: "GPU" or "TPU"; None: its devices are emulated.
    """
    actor: dict[str, Any] = {"num_cpus": 0}
    count = options.devices_per_cell or 1
    if resource == "GPU":
        actor["num_gpus"] = count
    elif resource is not None:
        actor["resources"] = {resource: count}
    router = RequestRouterConfig(
        request_router_class="nitsum_jax.cluster.on_ray.serve_router:CellRequestRouter",
        request_routing_stats_period_s=1.0,
    )
    common: dict[str, Any] = {
        "name": CELL,
        "max_ongoing_requests": _UNLIMITED,
        "ray_actor_options": actor,
        "request_router_config": router,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": max(10.0, 2 * options.silent_s),
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": _LEAVE_S,
    }
    if options.scales:
        common["autoscaling_config"] = AutoscalingConfig(
            min_replicas=options.least,
            initial_replicas=options.cells,
            max_replicas=options.most,
            upscale_delay_s=options.up_s,
            downscale_delay_s=options.down_s,
            metrics_interval_s=min(1.0, options.up_s / 2),
            # Not shorter, or a report that comes late on a busy machine leaves nothing to decide by.
            look_back_period_s=min(5.0, max(2.0, options.up_s)),
            policy=AutoscalingPolicy(policy_function="nitsum_jax.cluster.on_ray.deployment:wanted_replicas"),
        )
    else:
        common["num_replicas"] = options.cells
    # Serve would take what is deployed again for something new, and replace all cells to add one.
    deployment = serve.deployment(**common)(CellReplica).options(version=_version(options), _internal=True)
    return deployment.bind(options.cell_argv, options.report_s)
