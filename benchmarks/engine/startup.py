"""Seconds from the start of the server to the first token that a client sees.

  python benchmarks/engine/startup.py

Starts nitsum-serve and `nitsum-generate --wait` as a user would, at the same moment, with an empty compilation cache
(cold) and then with what the start before left there (warm).  The model file is fetched beforehand.
"""

import dataclasses
import json
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from nitsum_jax.errors import NitsumError, PreconditionError
from nitsum_jax.models.known.registry import KNOWN_MODELS, fetch
from nitsum_jax.server import cli

COLD, WARM = "cold", "warm"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    model: str
    devices: int
    warm_starts: int
    timeout_s: float
    serve_flags: tuple[str, ...]
    json: str | None


def read_options(argv: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("model", "smollm2-135m", "what to serve", flag_values=values)
    flags.DEFINE_integer("devices", 4, "devices, emulated on a CPU", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("warm_starts", 2, "starts with a warm cache", lower_bound=1, flag_values=values)
    flags.DEFINE_float("timeout_s", 600.0, "longest time for one start", lower_bound=1.0, flag_values=values)
    flags.DEFINE_multi_string(
        "serve_flag", [], "another flag for nitsum-serve; any number of these", flag_values=values
    )
    flags.DEFINE_string("json", None, "file for the results", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    return Options(
        model=values.model,
        devices=values.devices,
        warm_starts=values.warm_starts,
        timeout_s=values.timeout_s,
        serve_flags=tuple(values.serve_flag),
        json=values.json,
    )


def first_token_s(options: Options, cache: pathlib.Path) -> float:
    """Starts a server and a client, and returns after how many seconds the client printed something.

    Raises:
      PreconditionError: there was no token.
    """
    where = f"127.0.0.1:{_free_port()}"
    serve = [
        *(sys.executable, "-m", "nitsum_jax.server.launch.main"),
        *(f"--model={options.model}", f"--devices={options.devices}", f"--port={where.rpartition(':')[2]}"),
        *(f"--cache_dir={cache}", *options.serve_flags),
    ]
    ask = [
        *(sys.executable, "-m", "nitsum_jax.server.client.generate", f"--server={where}", "--wait"),
        *(f"--wait_seconds={options.timeout_s}", "--prompt=The capital of France is", "--max_tokens=8", "--ignore_eos"),
    ]
    start = time.perf_counter()
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL)
    try:
        with subprocess.Popen(ask, stdout=subprocess.PIPE) as client:
            assert client.stdout is not None
            first = client.stdout.read(1)
            seconds = time.perf_counter() - start
            client.stdout.read()
        if not first or client.returncode:
            raise PreconditionError("there was no token: see what the server and the client printed above")
        return seconds
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        options = read_options(argv)
        if options.model in KNOWN_MODELS:
            fetch(KNOWN_MODELS[options.model])
        results: dict[str, list[float]] = {COLD: [], WARM: []}
        with tempfile.TemporaryDirectory(prefix="nitsum-startup-") as folder:
            for name in (COLD, *[WARM] * options.warm_starts):
                results[name].append(first_token_s(options, pathlib.Path(folder)))
                cli.out(f"{name}: first token after {results[name][-1]:.1f} s")
        cli.out(f"cold {results[COLD][0]:.1f} s, warm {statistics.median(results[WARM]):.1f} s (median)")
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(results) + "\n", encoding="utf-8")
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
    except (NitsumError, OSError) as error:
        cli.err(f"startup: {error}")
        return cli.EXIT_USAGE
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
