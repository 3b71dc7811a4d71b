"""nitsum-bench compile: what the compiler of an accelerator makes of a step, without the accelerator.

Compiles steps of a model with one and with two layers for the target and extrapolates to all layers.  What is printed
is an estimate from the optimised program, nothing is measured; docs/accelerators.md says how it is counted.
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags

from nitsum_jax.bench.compile.explain import costs, costs_table
from nitsum_jax.bench.compile.report import SCHEMA, table
from nitsum_jax.bench.compile.rows import StepEstimate, compiled, estimate
from nitsum_jax.bench.compile.steps import StepCase
from nitsum_jax.bench.compile.targets import Target
from nitsum_jax.bench.gpu_check import shapes
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError, PreconditionError, one_line
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.server import cli

MODELS = {
    "llama-3.1-8b": shapes.LLAMA_8B,
    "qwen2.5-32b": shapes.QWEN_32B,
    "llama-3.1-70b": shapes.LLAMA_70B,
    "tiny": shapes.TINY,
}


@dataclasses.dataclass(frozen=True)
class CompileOptionsRead:
    """What the flags say."""

    target: Target
    model: ModelConfig
    tps: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    prefill: int | None
    vshards: int
    page_size: int
    dtype: str
    attention: str
    forms: str
    reduction: str
    explain: int
    json: str | None


def read_options(argv: Sequence[str]) -> CompileOptionsRead:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("target", "v5e:2x4", "devices: such as v5e:2x4, v6e:2x4 or h100x8", flag_values=values)
    flags.DEFINE_enum("model", "llama-3.1-8b", list(MODELS), "whose shapes", flag_values=values)
    flags.DEFINE_list("tps", ["1", "2", "4", "8"], "degrees of tensor parallelism", flag_values=values)
    flags.DEFINE_list("batch", ["32"], "sequences of a decode step", flag_values=values)
    flags.DEFINE_list("context", ["1024", "2048"], "tokens of each sequence in the KV cache", flag_values=values)
    flags.DEFINE_integer(
        "prefill",
        None,
        "new tokens of a prefill step of one sequence, and of mixed steps with each batch; none if not given",
        2,
        flag_values=values,
    )
    flags.DEFINE_integer("vshards", 8, "K, virtual shards of the model", 1, flag_values=values)
    flags.DEFINE_integer("page_size", 16, "W, tokens per KV block", 1, 128, flag_values=values)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of weights and KV cache", flag_values=values)
    flags.DEFINE_enum("attention", "auto", ["auto", "xla", "pallas"], "as nitsum-serve --attention", flag_values=values)
    flags.DEFINE_enum(
        "forms",
        "target",
        ["target", "cpu"],
        "target: the forms that steps have there; cpu: those that they have on a CPU, for comparison",
        flag_values=values,
    )
    flags.DEFINE_enum("reduction", "fixed", ["fixed", "fast"], "as nitsum-serve --reduction", flag_values=values)
    flags.DEFINE_integer(
        "explain",
        0,
        "lists what takes the time of each step: so many kinds of instructions, the costliest first",
        0,
        flag_values=values,
    )
    flags.DEFINE_string("json", None, "file for all results as JSON", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    return CompileOptionsRead(
        Target.parse(values.target),
        MODELS[values.model],
        _numbers("tps", values.tps),
        _numbers("batch", values.batch),
        _numbers("context", values.context),
        values.prefill,
        values.vshards,
        values.page_size,
        values.dtype,
        values.attention,
        values.forms,
        values.reduction,
        values.explain,
        values.json,
    )


def run(argv: Sequence[str]) -> None:
    """Compiles, prints and writes; see the module.

    Raises:
      PreconditionError: there is no compiler for the target here.
    """
    options = read_options(argv)
    # What is compiled runs nowhere, and no device that may be here is wanted.
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    options.target.devices()
    rows: list[StepEstimate] = []
    refused: list[str] = []
    explained: list[str] = []
    for tp, shape in itertools.product(options.tps, _shapes(options)):
        case = _case(options, tp, shape)
        try:
            steps = compiled(case)
        except jax.errors.JaxRuntimeError as error:
            refused.append(f"TP {tp}, {_named(shape)}: {one_line(str(error))}")
            cli.err(refused[-1])
            continue
        rows += [estimate(case, steps, context) for context in options.contexts]
        if options.explain:
            title = f"TP {tp}, {_named(shape)}, context {options.contexts[-1]}"
            explained.append(costs_table(title, costs(case, steps, options.contexts[-1]), options.explain))
        cli.err(f"TP {tp}, {_named(shape)}: compiled in {rows[-1].compile_s:.0f} s")
        if options.json is not None:  # after each, for those who cannot wait for all
            _write(options.json, rows, refused)
    if not rows:
        raise PreconditionError("nothing could be compiled: " + "; ".join(refused))
    cli.out("\n\n".join([table(rows, options.target.chip), *explained]))


def _shapes(options: CompileOptionsRead) -> list[StepShape]:
    found = [StepShape(batch, 1) for batch in options.batches]
    if options.prefill is None:
        return found
    mixed = [StepShape(1, options.prefill, batch) for batch in options.batches]
    return [*found, StepShape(1, options.prefill), *mixed]


def _named(shape: StepShape) -> str:
    return " + ".join(f"{part.batch} x {part.tokens}" for part in shape.parts)


def _case(options: CompileOptionsRead, tp: int, shape: StepShape) -> StepCase:
    platform = options.target.chip.platform if options.forms == "target" else "cpu"
    longest = max(options.contexts) + shape.tokens
    return StepCase(
        options.target,
        options.model,
        tp,
        shape,
        max_model_len=longest,
        pool_tokens=shape.rows * longest,
        vshards=options.vshards,
        page_size=options.page_size,
        dtype=options.dtype,
        forms=step_forms(platform, options.dtype, options.attention),
        fast_sums=options.reduction == "fast",
    )


def _write(path: str, rows: Sequence[StepEstimate], refused: Sequence[str]) -> None:
    content = {
        "schema": SCHEMA,
        "jax": jax.__version__,
        "steps": [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows],
        "refused": list(refused),
    }
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _numbers(name: str, texts: Sequence[str]) -> tuple[int, ...]:
    try:
        found = tuple(int(text) for text in texts)
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InvalidInputError(f"--{name}={','.join(texts)} must be whole numbers such as 1,8")
    return found
