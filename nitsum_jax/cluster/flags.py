"""The flags of nitsum-cluster: some of its own, and those of nitsum-serve for every cell."""

import dataclasses
from collections.abc import Sequence

from absl import flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server import cli
from nitsum_jax.server.launch.flags import LaunchOptions, read_options

USAGE = """nitsum-cluster serves one model from many cells on Ray, behind one front door.

  nitsum-cluster --model=smollm2-135m --cells=2 --devices_per_cell=4 --http_port=8000

It starts a Ray of its own, or joins one (--address=auto). It takes all flags of nitsum-serve, too, but --devices: they
hold for the front door or for every cell. SIGTERM or Ctrl-C lets the requests that are alive finish.
Exit status: as of nitsum-serve."""


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """What the flags say.

    Attributes:
      cells: at the start.
      devices_per_cell: of every cell; None: all that its process sees.
      address: of a Ray cluster; None: one of its own is started.
      least, most: cells that autoscaling may have; equal: it is off.
      up_s, down_s: seconds for which more or fewer cells must be wanted.
      report_s: seconds between two reports of a cell.
      silent_s: a cell that says nothing for so long is left.
      start_s: most seconds until all cells serve.
      ray_dashboard, ray_usage: whether Ray's own dashboard runs, and whether Ray reports its usage.
      serve: of nitsum-serve.
      cell_argv: command line of nitsum-serve from which every cell reads its options.
    """

    cells: int
    devices_per_cell: int | None
    address: str | None
    least: int
    most: int
    up_s: float
    down_s: float
    report_s: float
    silent_s: float
    start_s: float
    ray_dashboard: bool
    ray_usage: bool
    serve: LaunchOptions
    cell_argv: tuple[str, ...]

    @property
    def scales(self) -> bool:
        """Whether cells come and go with the load."""
        return self.least < self.most


def read(argv: Sequence[str]) -> ClusterOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = _define()
    try:
        rest = cli.parse(values, argv, USAGE, others=True)
    except cli.HelpRequested as own:
        raise cli.HelpRequested(f"{own}\n\n{_help_of_server()}") from None
    if any(argument.lstrip("-").split("=")[0] == "devices" for argument in rest[1:]):
        raise InvalidInputError("--devices is that of one server: give --devices_per_cell")
    if values.devices_per_cell is not None:
        rest = [*rest, f"--devices={values.devices_per_cell}"]
    least, most = values.min_cells or values.cells, values.max_cells or values.cells
    if not least <= values.cells <= most:
        raise InvalidInputError(
            f"--cells={values.cells} must be from --min_cells={least} to --max_cells={most}: change one of them"
        )
    return ClusterOptions(
        values.cells,
        values.devices_per_cell,
        values.address,
        least,
        most,
        values.scale_up_seconds,
        values.scale_down_seconds,
        values.report_ms / 1000,
        values.silent_seconds,
        values.start_seconds,
        values.ray_dashboard,
        values.ray_usage_stats,
        read_options(rest),
        tuple(rest),
    )


def _help_of_server() -> str:
    try:
        read_options(["nitsum-serve", "--help"])
    except cli.HelpRequested as request:
        return str(request)
    raise AssertionError("help was asked for")


def _define() -> flags.FlagValues:
    values = flags.FlagValues()

    def count(name: str, default: int | None, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    def seconds(name: str, default: float, meaning: str) -> None:
        flags.DEFINE_float(name, default, meaning, lower_bound=0.1, flag_values=values)

    count("cells", 2, "cells at the start")
    count(
        "devices_per_cell",
        None,
        "devices of every cell: GPUs or TPU chips that Ray gives it, emulated ones on a CPU; all that its process sees "
        "if not given",
    )
    flags.DEFINE_string(
        "address", None, "Ray cluster to join, such as auto; if not given, one is started", flag_values=values
    )
    count("min_cells", None, "fewest cells that autoscaling keeps; --cells if not given")
    count("max_cells", None, "most cells that autoscaling makes; --cells if not given")
    seconds("scale_up_seconds", 5.0, "for so long more cells must be wanted before autoscaling adds one")
    seconds("scale_down_seconds", 60.0, "for so long fewer cells must be wanted before autoscaling takes one away")
    flags.DEFINE_integer(
        "report_ms", 200, "milliseconds between two reports of a cell to the router", 50, 10_000, flag_values=values
    )
    seconds("silent_seconds", 5.0, "a cell that says nothing for so long is left, and its streams go on elsewhere")
    seconds("start_seconds", 600.0, "most seconds until all cells serve")
    flags.DEFINE_bool("ray_dashboard", False, "run Ray's own dashboard, on the loopback address", flag_values=values)
    flags.DEFINE_bool("ray_usage_stats", False, "let Ray report its usage to its makers", flag_values=values)
    return values
