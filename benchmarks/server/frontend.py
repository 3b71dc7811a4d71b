"""What the front ends cost: tokens per second through gRPC and HTTP beside the rate of the engine alone.

  python benchmarks/server/frontend.py --streams=64,500

An engine without a model says one token per stream every --step_ms. It is measured alone, then behind each front end,
with clients in another process. The share that is kept is the rate while all streams are alive, by the engine's own;
the cost is the processor time of the serving process (engine thread included) per token.
"""

import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.server.frontend_clients import GRPC, HTTP
from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.server import cli

_HERE = pathlib.Path(__file__).resolve().parent
_LIMIT_S = 300


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    streams: tuple[int, ...]
    tokens: int
    step_ms: float
    rounds: int
    json: str | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One front end at one number of streams, medians of the rounds.

    Attributes:
      front_end: "grpc" or "http".
      streams: alive at once.
      alone: tokens per second of the engine without front ends.
      rate: tokens per second that came to the clients.
      kept: rate / alone, of the same round.
      cpu_us: processor time of the serving process per token, microseconds.
      complete: streams that brought all their tokens, of all rounds.
    """

    front_end: str
    streams: int
    alone: float
    rate: float
    kept: float
    cpu_us: float
    complete: int


def read_options(argv: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_list("streams", ["64", "500"], "numbers of streams", flag_values=values)
    flags.DEFINE_integer("tokens", 600, "tokens per stream", lower_bound=2, flag_values=values)
    flags.DEFINE_float("step_ms", 20.0, "time of a step, in which each stream gets a token", 0.0, flag_values=values)
    flags.DEFINE_integer("rounds", 3, "rounds, of which the median is told", lower_bound=1, flag_values=values)
    flags.DEFINE_string("json", None, "file to write the rows to", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    try:
        streams = tuple(int(text) for text in values.streams)
    except ValueError:
        raise InvalidInputError(f"--streams={','.join(values.streams)}: give whole numbers, such as 64,500") from None
    if not streams or min(streams) < 1:
        raise InvalidInputError("--streams needs numbers from 1 on")
    return Options(streams, values.tokens, values.step_ms, values.rounds, values.json)


def measure(options: Options, front_end: str, streams: int) -> Row:
    """All rounds of one row."""
    rounds = [_round(options, front_end, streams) for _ in range(options.rounds)]
    return Row(
        front_end,
        streams,
        alone=statistics.median(alone for alone, *_ in rounds),
        rate=statistics.median(rate for _, rate, *_ in rounds),
        kept=statistics.median(rate / alone for alone, rate, *_ in rounds),
        cpu_us=statistics.median(cpu_us for _, _, cpu_us, _ in rounds),
        complete=sum(complete for *_, complete in rounds),
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| front end | streams | engine alone, tokens/s | through it, tokens/s | kept | CPU per token, us |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.front_end} | {row.streams} | {row.alone:.0f} | {row.rate:.0f} | {row.kept:.0%} | {row.cpu_us:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def _round(options: Options, front_end: str, streams: int) -> tuple[float, float, float, int]:
    """(engine alone, through the front end, microseconds of processor per token, complete streams)."""
    tokens, step = str(options.tokens), str(options.step_ms / 1e3)
    script = str(_HERE / "frontend_server.py")
    said = _output([sys.executable, script, "--alone", str(streams), tokens, step])
    with subprocess.Popen(
        [sys.executable, script, step], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            assert server.stdout is not None
            ports = dict(zip((GRPC, HTTP), server.stdout.readline().split(), strict=True))
            clients = [sys.executable, str(_HERE / "frontend_clients.py"), front_end, ports[front_end]]
            _output([*clients, "2", "2"])  # the first call of anything is slower than all others
            before = _cpu_s(server.pid)
            result = json.loads(_output([*clients, str(streams), tokens]))
            cpu_s = _cpu_s(server.pid) - before
            server.communicate("", timeout=20)
        finally:
            server.kill()
    cpu_us = cpu_s * 1e6 / (streams * options.tokens)
    return float(said), float(result["tokens_per_s"]), cpu_us, int(result["complete"])


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=_LIMIT_S)
    return done.stdout.strip()


def _cpu_s(pid: int) -> float:
    """Processor time of a process so far, seconds."""
    # The clock of another process, as clock_getcpuclockid(3) makes it: in nanoseconds, where /proc/PID/stat counts
    # ticks of 10 ms, which is all that a short run takes.
    return time.clock_gettime((~pid << 3) | 2)


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and returns its exit status."""
    try:
        options = read_options(argv)
    except cli.HelpRequested as request:
        cli.out(str(request))
        return cli.EXIT_OK
    except NitsumError as error:
        cli.err(f"frontend: {error}")
        return cli.EXIT_USAGE
    rows = [measure(options, front_end, streams) for streams in options.streams for front_end in (GRPC, HTTP)]
    cli.out(table(rows))
    if options.json is not None:
        pathlib.Path(options.json).write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n")
    missing = sum(row.streams * options.rounds - row.complete for row in rows)
    if missing:
        cli.err(f"frontend: {missing} streams did not bring all their tokens")
        return cli.EXIT_FAILED
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
