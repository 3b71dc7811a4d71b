"""How much slower a stream's tokens come while another layout is compiled behind it, against before, in one run.

  JAX_NUM_CPU_DEVICES=4 python benchmarks/engine/compiling.py

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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.executables.compiling import ASKED_FOR
from nitsum_jax.engine.request import Request, TokenDelta
from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import parse_layout
from nitsum_jax.models.loading import open_model
from nitsum_jax.runtime.startup import compile_cache
from nitsum_jax.server import cli

_POLL_S = 0.05
_WARM_UP_S = 2.0  # the first steps find caches cold
_TOKENS = 256
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
    def between(cls, times: dict[str, list[float]], ended: set[str], begin_s: float, end_s: float) -> "Gaps":
        """Of the gaps that end between two moments; one that lasts beyond the second counts as far as it got.

        Args:
          times: of the tokens, by stream.
          ended: streams that have no more tokens to come.
          begin_s: first moment.
          end_s: second moment.
        """
        gaps = []
        for name, stream in times.items():
            ends = [time_s for time_s in stream if time_s <= end_s]
            if name not in ended:
                ends.append(end_s)
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
        self.ended: set[str] = set()
        self._lock = threading.Lock()

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        with self._lock:
            for delta in deltas:
                self.times.setdefault(delta.request_id, []).extend([delta.time_s] * len(delta.token_ids))
                if delta.finish_reason is not None:
                    self.ended.add(delta.request_id)

    def gaps(self, begin_s: float, end_s: float) -> Gaps:
        with self._lock:
            return Gaps.between(self.times, self.ended, begin_s, end_s)


class _Streams:
    """Keeps so many streams alive."""

    def __init__(self, engine: Engine, watch: _Watch, count: int) -> None:
        self._engine = engine
        self._watch = watch
        self._count = count
        self._begun = 0

    def until(self, condition: Callable[[], bool]) -> float:
        """Goes on until something is the case; returns when that was."""
        while not condition():
            for _ in range(self._count - self._begun + len(self._watch.ended)):
                self._engine.submit(Request(f"stream-{self._begun}", (1, 2 + self._begun % 16, 3), _TOKENS))
                self._begun += 1
            time.sleep(_POLL_S)
        return time.monotonic()

    def for_s(self, seconds: float) -> float:
        """Goes on for some time; returns when that was over."""
        end = time.monotonic() + seconds
        return self.until(lambda: time.monotonic() >= end)


def measure(options: Options) -> dict[str, Gaps]:
    """Runs the benchmark: "before" and "compiling".

    Raises:
      RuntimeError: the layout does not compile.
    """
    watch = _Watch()
    with _engine(options, watch) as engine:
        cli.err(f"compiling {options.layout}")
        engine.wait_for_layouts()
        cli.err("watching the streams")
        streams, executables = _Streams(engine, watch, options.streams), engine.cell.executables
        quiet = streams.for_s(_WARM_UP_S)
        begin = streams.for_s(options.quiet_s)
        cli.err(f"compiling {options.to} beside them")
        # Not by way of the engine: the allow-list keeps it from compiling anything before we ask.
        groups = engine.cell.groups(parse_layout(options.to, len(engine.cell.devices)))
        executables.want(groups, ASKED_FOR)

        def made() -> bool:
            return any(map(executables.failure, groups)) or all(map(executables.ready, groups))

        end = streams.until(made)
        executables.wait(groups)
        return {"before": watch.gaps(quiet, begin), "compiling": watch.gaps(begin, end)}


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
    flags.DEFINE_float("quiet_s", 10.0, "seconds to watch before", lower_bound=0.1, flag_values=values)
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
