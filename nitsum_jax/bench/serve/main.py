"""nitsum-bench serve: plays traces against a server over gRPC and prints TTFT, TPOT and goodput of each tier."""

import asyncio
import pathlib
import sys
from collections.abc import Sequence

import grpc.aio
from absl import flags

from nitsum_jax.bench.serve.plot import save_plot
from nitsum_jax.bench.serve.results import Results, write_json
from nitsum_jax.bench.serve.session import Progress, Session, capped, drive
from nitsum_jax.control.tiers import DEFAULT_TIERS, TierSet, read_tiers
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server import cli
from nitsum_jax.server.client import identity_flags
from nitsum_jax.server.client.channel import does_not_serve, open_channel
from nitsum_jax.sim.runs.records import REQUESTS, to_line
from nitsum_jax.sim.workloads.workload_flags import workload_of

USAGE = """nitsum-bench serve sends requests as a trace says, however slow the answers are (open loop), over gRPC.

  nitsum-bench serve --server=localhost:50051 --trace=interactive:azure-conv-like --seconds=60 --rate_scale=0.5

Prompts are random tokens of the trace's lengths. TTFT counts from when the client sent. The figures are invalid, and
say so, where the client itself was late, or a paced server could not keep its pace."""


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    identity_flags.define(values)
    flags.DEFINE_multi_string(
        "trace",
        [],
        "TIER:FILE or TIER:FILE:FORMAT, or TIER: and a stand-in, azure-conv-like or azure-code-like; any number",
        flag_values=values,
    )
    flags.DEFINE_float("rate_scale", 1.0, "factor on the rate", lower_bound=1e-9, flag_values=values)
    flags.DEFINE_float(
        "seconds", None, "length of the load; the traces' own if not given", lower_bound=0, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "seed of everything that is random", lower_bound=0, flag_values=values)
    flags.DEFINE_string(
        "tiers", None, "TOML file with the tiers' targets: the one that the server has", flag_values=values
    )
    flags.DEFINE_float(
        "time_scale",
        None,
        "real seconds per second of the trace; if not given, that of a paced server, else 1",
        lower_bound=1e-6,
        flag_values=values,
    )
    flags.DEFINE_float("warm_up", 0.0, "seconds at the start that are left out", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("max_prompt", None, "longer prompts are cut to this", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("max_output", None, "longer outputs are cut to this", lower_bound=1, flag_values=values)
    flags.DEFINE_string("json", None, "file to write all figures to, as JSON", flag_values=values)
    flags.DEFINE_string("plot", None, "file for a picture, .png or .svg", flag_values=values)
    flags.DEFINE_string("out", None, f"folder that gets {REQUESTS}, as nitsum-simulate writes it", flag_values=values)
    return values


def run(argv: Sequence[str]) -> None:
    """Runs the subcommand.

    Raises:
      NitsumError: flags or traces are wrong, the server cannot be reached, or no request counted.
    """
    asyncio.run(run_async(argv))


async def run_async(argv: Sequence[str]) -> Results:
    """Like `run`, on a loop that is running; returns the figures."""
    values = define()
    cli.parse(values, argv, USAGE)
    if not values.trace:
        raise InvalidInputError("give at least one --trace, such as --trace=interactive:azure-conv-like")
    tiers: TierSet = read_tiers(values.tiers) if values.tiers is not None else DEFAULT_TIERS
    workload = workload_of(
        values.trace,
        tiers,
        values.tiers or "the default tiers",
        seconds=values.seconds,
        rate_scale=values.rate_scale,
        seed=values.seed,
        note=cli.err,
    )
    workload = capped(workload, values.max_prompt, values.max_output)
    session = Session(workload, tiers, values.warm_up, values.time_scale, values.seed)
    try:
        async with open_channel(values.server, identity_flags.read(values)) as channel:
            results = await drive(channel, session, progress_line(len(workload.requests)))
    except grpc.aio.AioRpcError as error:
        raise does_not_serve(values.server, error) from None
    cli.out(results.table())
    if values.json is not None:
        write_json(results, values.json)
    if values.plot is not None:
        save_plot(results, tiers, workload.seconds - values.warm_up, values.plot)
    if values.out is not None:
        folder = pathlib.Path(values.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REQUESTS).write_text("".join(map(to_line, results.records)), encoding="utf-8")
    return results


def progress_line(total: int) -> Progress:
    """Tells of the progress on one line of a terminal, every 10 s elsewhere."""
    terminal, told = sys.stderr.isatty(), [0]

    def show(sent: int, ended: int, alive: int) -> None:
        line = f"{sent} of {total} requests sent, {ended} ended, {alive} alive"
        if terminal:
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if ended == total else ""))
            sys.stderr.flush()
        elif told[0] % 10 == 0:
            cli.err(line)
        told[0] += 1

    return show
