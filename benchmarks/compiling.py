"""How much slower a stream's tokens come while another layout is compiled behind it, against before, in one run.

  JAX_NUM_CPU_DEVICES=4 python benchmarks/compiling.py

An engine serves --streams streams in --layout and knows no other, with an empty compilation cache.  When everything of
that layout is compiled and tried, the times between two tokens of a stream are noted for --quiet_s; then --to is asked
for, and they are noted until it could be switched to.  The quotients of the two are what compiling costs a stream.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.executables import ASKED_FOR
from nitsum_jax.engine.request import Request, TokenDelta
from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.models.loading import open_model
from nitsum_jax.server import cli, compile_cache

_POLL_S = 0.05
# Few buckets: what is compiled before anything can be measured takes as long as what is measured.
_MAX_BATCH, _PREFILL_CHUNK = 8, 32


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    model: str
    dtype: str
    layout: str
    to: str
    streams: int
    quiet_s: float
    kv_cache_gib: float
    json: str | None


@dataclasses.dataclass(frozen=True)
class Gaps:
    """Times between two tokens of a stream, in milliseconds.

    Attributes:
      seconds: how long they were watched.
      tokens: how many there were.
      mean: of the times; streams / mean is their rate.
      p50: median.
      p99: of 100 times, the second longest.
      longest: of all.
    """

    seconds: float
    tokens: int
    mean: float
    p50: float
    p99: float
    longest: float

    @classmethod
    def between(cls, times: dict[str, list[float]], begin_s: float, end_s: float) -> "Gaps":
        """Of the gaps that end between two moments; a gap that lasts beyond the second one counts as far as it got."""
        gaps = []
        for stream in times.values():
            ends = [*(time_s for time_s in stream if time_s <= end_s), end_s]
            gaps += [1000 * (b - a) for a, b in itertools.pairwise(ends) if b > begin_s and b > a]
        gaps.sort()
        return cls(
            end_s - begin_s,
            len(gaps),
            statistics.fmean(gaps),
            statistics.median(gaps),
            gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))],
            gaps[-1],
        )


class _Watch:
    """Notes when each stream got its tokens."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.ended: list[str] = []
        self._lock = threading.Lock()

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        with self._lock:
            for delta in deltas:
                self.times.setdefault(delta.request_id, []).extend([delta.time_s] * len(delta.token_ids))
                if delta.finish_reason is not None:
                    self.ended.append(delta.request_id)

    def gaps(self, begin_s: float, end_s: float) -> Gaps:
        with self._lock:
            return Gaps.between({name: list(times) for name, times in self.times.items()}, begin_s, end_s)


def measure(options: Options) -> dict[str, Gaps]:
    """Runs the benchmark: "before", "compiling" and "after".

    Raises:
      RuntimeError: the layout does not compile, or the streams were too short.
    """
    watch = _Watch()
    with _engine(options, watch) as engine:
        cli.err(f"compiling {options.layout}")
        engine.wait_for_layouts()
        cli.err("watching the streams")
        limit = engine.context_limit()
        for index in range(options.streams):
            engine.submit(Request(f"stream-{index}", (1, 2 + index, 3), limit))
        while len(watch.times) < options.streams:
            time.sleep(_POLL_S)
        time.sleep(1.0)  # the first steps find caches cold
        quiet = time.monotonic()
        time.sleep(options.quiet_s)
        begin = time.monotonic()
        cli.err(f"compiling {options.to} beside them")
        # Not by way of the engine: the allow-list keeps it from compiling anything before we ask.
        groups = engine.cell.groups(parse_layout(options.to, len(engine.cell.devices)))
        engine.cell.executables.want(groups, ASKED_FOR)
        while not all(map(engine.cell.executables.ready, groups)):
            time.sleep(_POLL_S)
            for group in groups:
                if (failure := engine.cell.executables.failure(group)) is not None:
                    raise RuntimeError(failure)
        end = time.monotonic()
        engine.cell.executables.wait(groups, everything=True)
        after = time.monotonic()
        time.sleep(options.quiet_s)
        if watch.ended:
            raise RuntimeError("a stream ended before the layout was compiled: choose a model of longer context")
        return {
            "before": watch.gaps(quiet, begin),
            "compiling": watch.gaps(begin, end),
            "after": watch.gaps(after, after + options.quiet_s),
        }


@contextlib.contextmanager
def _engine(options: Options, watch: _Watch) -> Iterator[Engine]:
    with tempfile.TemporaryDirectory(prefix="nitsum-compiling-") as cache:
        compile_cache.enable(cache)
        config = EngineConfig(
            layout=options.layout,
            layouts=(options.layout,),
            dtype=options.dtype,
            kv_cache_gib=options.kv_cache_gib,
            max_batch=_MAX_BATCH,
            prefill_chunk=_PREFILL_CHUNK,
        )
        engine = start_engine(open_model(options.model), config, watch.take)
        try:
            yield engine
        finally:
            engine.close()


def table(results: dict[str, Gaps]) -> str:
    """The results for people; the last column is how many times as long as before a token took on average."""
    lines = ["| | for | mean gap | p50 | p99 | longest | mean / before |", "|---|---|---|---|---|---|---|"]
    for name, gaps in results.items():
        times = " | ".join(f"{value:.0f} ms" for value in (gaps.mean, gaps.p50, gaps.p99, gaps.longest))
        lines.append(f"| {name} | {gaps.seconds:.0f} s | {times} | {gaps.mean / results['before'].mean:.1f} |")
    return "\n".join(lines)


def read_options(argv: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("model", "smollm2-135m", "what to serve", flag_values=values)
    flags.DEFINE_string("dtype", "auto", "of weights and KV cache", flag_values=values)
    flags.DEFINE_string("layout", "tp1x4", "in which the streams run", flag_values=values)
    flags.DEFINE_string("to", "tp4", "what is compiled meanwhile", flag_values=values)
    flags.DEFINE_integer("streams", 4, "how many run", lower_bound=1, flag_values=values)
    flags.DEFINE_float("quiet_s", 10.0, "seconds to watch before and after", lower_bound=0.1, flag_values=values)
    flags.DEFINE_float("kv_cache_gib", 0.5, "KV pool per device, GiB", lower_bound=0.001, flag_values=values)
    flags.DEFINE_string("json", None, "file for the results", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    chosen: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Options)}
    return Options(**chosen)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        options = read_options(argv)
        results = measure(options)
        cli.out(table(results))
        if options.json:
            rows = {name: dataclasses.asdict(gaps) for name, gaps in results.items()}
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
    except (NitsumError, OSError, RuntimeError) as error:
        cli.err(f"compiling: {error}")
        return cli.EXIT_FAILED if isinstance(error, RuntimeError) else cli.EXIT_USAGE
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
