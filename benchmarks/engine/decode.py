"""Tokens per second of greedy decoding: the engine, its bare executable, and other libraries, in one run.

  python benchmarks/engine/decode.py                                    # or: make bench
  python benchmarks/engine/decode.py --reference_python=ENV/bin/python  # an interpreter with torch and transformers
  python benchmarks/engine/decode.py --beside=int8,int4                 # engines with quantised weights as well

One instance on one device; prompts of 32 tokens.  The decode phase begins when all sequences have their first token and
ends when each has got 64 more; the batch is full all the time.  The bare executable is the same compiled step with the
same weights from the same contexts, called in a loop, its inputs made before and its tokens read back at the end.
transformers (float32, KV cache, eager or sdpa, whichever is faster) and llama-cpp-python (batch 1, the file's own
quantisation) decode the same prompts.  All take turns in rounds, because machines are noisy: the tables give medians,
and ratios are medians of the ratios within a round.

The physical limit: a step reads every weight once, so it takes at least their bytes by the machine's bandwidth, which
is measured in the same run.  (A larger batch computes more per byte and is bound by arithmetic in the end.)
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.engine import decode_table
from benchmarks.engine.bandwidth import read_bandwidth
from benchmarks.engine.decode_runs import BareRunner, EngineRun, EngineRunner, lead_limit, running
from benchmarks.engine.decode_table import BARE, ENGINE, LLAMA_CPP, Sample
from benchmarks.engine.reference import Reference, default_python
from nitsum_jax.bench.compile.operations import operations
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.models.known.registry import KNOWN_MODELS, fetch
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.runtime.startup import compile_cache
from nitsum_jax.server import cli

_TEXT = """The lighthouse keeper had not seen a ship for three weeks, and on the morning of the fourth Monday he went
down to the harbour to ask why. Nobody there could tell him. The boats lay on the sand, the nets hung dry in the wind,
and the old women who sold herring were selling apples instead, 12 for a penny, from the hills behind the town."""
_WORTH_A_WARNING = 0.9


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    model: str
    dtype: str
    vshards: int
    batches: tuple[int, ...]
    rounds: int
    prompt_tokens: int
    tokens: int
    prefill_chunk: int
    kv_cache_gib: float
    bandwidth_mb: int
    reference_python: str
    cache_dir: str | None
    explain: bool
    quantization: str
    beside: tuple[str, ...]
    json: str | None


def read_options(argv: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()

    def text(name: str, default: str | None, meaning: str) -> None:
        flags.DEFINE_string(name, default, meaning, flag_values=values)

    def count(name: str, default: int, meaning: str) -> None:
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)

    text("model", "smollm2-135m", "name of a known model, a GGUF file or a model folder")
    flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "of weights and KV cache", flag_values=values)
    text("quantization", "none", "of the weights, as nitsum-serve --quantization")
    flags.DEFINE_list("beside", [], "quantisations of engines that take turns with it", flag_values=values)
    count("vshards", 1, "K, virtual shards; more than 1 shows what separate buffers cost")
    flags.DEFINE_list("batches", ["1", "8", "32"], "numbers of sequences", flag_values=values)
    count("rounds", 5, "how often each is timed")
    count("prompt_tokens", 32, "length of the prompts")
    count("tokens", 64, "length of the decode phase")
    count("prefill_chunk", 128, "most prompt tokens in one step")
    flags.DEFINE_float("kv_cache_gib", 0.5, "KV pool; there are two of them", lower_bound=0.0, flag_values=values)
    count("bandwidth_mb", 512, "size of the array whose reading is timed; much more than the caches hold")
    text("reference_python", default_python(), "interpreter with torch and transformers, or llama_cpp; empty: none")
    text("cache_dir", None, "folder for compiled executables, as in nitsum-serve")
    flags.DEFINE_bool("explain", False, "print the operations of a decode step, and its time per layer", values)
    text("json", None, "file for the results")
    cli.parse(values, argv, __doc__ or "")
    try:
        batches = tuple(int(item) for item in values.batches)
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise InvalidInputError(f"--batches={','.join(values.batches)}: give numbers of at least 1, such as 1,8,32")
    lists = {"batches", "beside"}
    rest: dict[str, Any] = {f.name: values[f.name].value for f in dataclasses.fields(Options) if f.name not in lists}
    return Options(batches=batches, beside=tuple(values.beside), **rest)


def prompts(model: OpenModel, batch: int, length: int) -> list[list[int]]:
    """`batch` different prompts of `length` tokens: pieces of one text, which goes round."""
    ids = model.tokenizer.encode(_TEXT, add_special=False)
    return [[ids[(7 * index + offset) % len(ids)] for offset in range(length)] for index in range(batch)]


def model_path(spec: str) -> pathlib.Path:
    """Where the model lies that other libraries are to load."""
    return fetch(KNOWN_MODELS[spec]) if spec in KNOWN_MODELS else pathlib.Path(spec).expanduser()


class Benchmark:
    """All that takes turns."""

    def __init__(
        self,
        options: Options,
        model: OpenModel,
        engine: EngineRunner,
        beside: Mapping[str, EngineRunner],
        reference: Reference | None,
    ):
        self._options = options
        self._model = model
        self._engine = engine
        self._beside = beside
        self._reference = reference
        self.bare = BareRunner(engine)
        self.samples: list[Sample] = []
        self.same_tokens: dict[int, float] = {}
        self._last: dict[int, EngineRun] = {}

    def run(self) -> None:
        """All rounds; what a first run has to set up is done before they begin."""
        for batch in self._options.batches:
            self._round(batch, -1)
            cli.err(f"batch {batch} warmed up")
        for number in range(self._options.rounds):
            for batch in self._options.batches:
                self._round(batch, number)
            cli.err(f"round {number + 1} of {self._options.rounds} done")

    def _round(self, batch: int, number: int) -> None:
        asked = prompts(self._model, batch, self._options.prompt_tokens)
        turns: list[Callable[[], Sample]] = [
            lambda: self._time_engine(batch, asked, number),
            lambda: self._time_bare(batch, asked, number),
        ]
        if number % 2 and number > 0:  # the warm-up has the engine first: the bare run needs to know its tokens
            turns.reverse()  # whoever comes second may find another machine
        for name, other in self._beside.items():
            turns.append(lambda name=name, other=other: self._time_other(name, other, batch, asked, number))  # type: ignore[misc]
        for name in self._reference.there if self._reference is not None else ():
            if name != LLAMA_CPP or batch == 1:
                turns.append(lambda name=name: self._time_reference(name, batch, asked, number))  # type: ignore[misc]
        samples = [turn() for turn in turns]
        if number >= 0:
            self.samples += samples

    def _time_engine(self, batch: int, asked: list[list[int]], number: int) -> Sample:
        run = self._last[batch] = self._engine.run(asked, self._options.tokens)
        return Sample(number, batch, ENGINE, run.decode_tokens / run.decode_s, run.total_tokens / run.total_s)

    def _time_other(self, name: str, engine: EngineRunner, batch: int, asked: list[list[int]], number: int) -> Sample:
        run = engine.run(asked, self._options.tokens)
        return Sample(number, batch, name, run.decode_tokens / run.decode_s, run.total_tokens / run.total_s)

    def _time_bare(self, batch: int, asked: list[list[int]], number: int) -> Sample:
        run = self.bare.run(asked, self._last[batch], self._options.tokens)
        self.same_tokens[batch] = min(run.same_tokens, self.same_tokens.get(batch, 1.0))
        return Sample(number, batch, BARE, run.decode_tokens / run.decode_s)

    def _time_reference(self, name: str, batch: int, asked: list[list[int]], number: int) -> Sample:
        assert self._reference is not None
        times = self._reference.run(name, asked, self._options.tokens)
        return Sample(
            number, batch, name, times["tokens"] / times["decode_s"], (times["tokens"] + batch) / times["total_s"]
        )


def run(options: Options) -> dict[str, object]:
    """Runs everything, prints the tables, and returns what --json writes."""
    compile_cache.enable(options.cache_dir)
    model = open_model(options.model)
    longest = max(options.batches)
    config = EngineConfig(
        devices=1,
        layout="tp1",
        vshards=options.vshards,
        dtype=options.dtype,
        quantization=options.quantization,
        max_batch=longest,
        prefill_chunk=options.prefill_chunk,
        kv_cache_gib=options.kv_cache_gib,
    )
    needed = options.prompt_tokens + options.tokens + lead_limit(prompts(model, longest, options.prompt_tokens))
    if needed > model.config.max_context:
        raise InvalidInputError(
            f"the longest sequence may have {needed} tokens, and the model's context is {model.config.max_context}: "
            "lower --tokens, --prompt_tokens or --batches"
        )
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(running(model, config))
        beside = {
            f"{ENGINE} {one}": stack.enter_context(running(model, dataclasses.replace(config, quantization=one)))
            for one in options.beside
        }
        reference = None
        if options.reference_python:
            reference = Reference(options.reference_python, model_path(options.model))
            stack.callback(reference.close)
        benchmark = Benchmark(options, model, engine, beside, reference)
        before = read_bandwidth(jax.devices()[0], options.bandwidth_mb)
        benchmark.run()
        bandwidth = max(before, read_bandwidth(jax.devices()[0], options.bandwidth_mb))
        dtype, weights = engine.engine._cell.program.dtype, benchmark.bare.weight_bytes
        steps = {batch: operations(benchmark.bare.hlo(batch)) for batch in options.batches} if options.explain else {}
        layers = benchmark.bare.layers
        bytes_of = {name: other.engine.cell.memory.weights for name, other in beside.items()}

    limit_ms = 1000 * weights / bandwidth
    limits = {name: 1000 * size / bandwidth for name, size in bytes_of.items()}
    found = decode_table.rows(benchmark.samples, {ENGINE: limit_ms, BARE: limit_ms} | limits)
    kept = "" if options.quantization == "none" else f" and {options.quantization}"
    cli.out(
        f"{model.name}, {dtype}{kept}, vshards={options.vshards}, {options.tokens} tokens each, {options.rounds} rounds"
    )
    if reference is not None:
        for name, version in reference.there.items():
            cli.out(f"{name}: {version}")
        for name, why in reference.missing.items():
            cli.out(f"{name}: left out ({why}; --reference_python names an interpreter that has it)")
    cli.out(
        f"limit: {weights / 1e6:.1f} MB of weights a step at {bandwidth / 1e9:.1f} GB/s take {limit_ms:.2f} ms; "
        f"at batch 1 that is {1000 / limit_ms:.0f} tokens/s"
    )
    cli.out(decode_table.table(found))
    for batch in options.batches:
        share = decode_table.ratio(benchmark.samples, batch, ENGINE, BARE)
        parts = [
            f"engine / {name} {value:.2f}"
            for name in (*decode_table.RATIOS, *limits)
            if (value := decode_table.ratio(benchmark.samples, batch, ENGINE, name)) is not None
        ]
        low = "  <- below 0.90" if share is not None and share < _WORTH_A_WARNING else ""
        same = f"{benchmark.same_tokens[batch]:.1%} of the bare loop's tokens are the engine's"
        cli.out(f"batch {batch}: {', '.join(parts)} ({same}){low}")
        if batch in steps:
            (step_ms,) = (row.step_ms for row in found if (row.batch, row.name) == (batch, BARE))
            cli.out(f"batch {batch}: {decode_table.explained(steps[batch], layers, step_ms)}")
    return {
        "model": model.name,
        "dtype": dtype,
        "vshards": options.vshards,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "weight_bytes": weights,
        "bandwidth_bytes_per_s": bandwidth,
        "limit_ms": limit_ms,
        "same_tokens": benchmark.same_tokens,
        "operations": {batch: dataclasses.asdict(step) for batch, step in steps.items()},
        "rows": [dataclasses.asdict(row) for row in found],
        "samples": [dataclasses.asdict(sample) for sample in benchmark.samples],
    }


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        options = read_options(argv)
        results = run(options)
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
    except (NitsumError, OSError) as error:
        cli.err(f"decode: {error}")
        return cli.EXIT_USAGE
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
