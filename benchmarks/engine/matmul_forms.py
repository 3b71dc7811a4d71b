"""Which form of matrix product is fastest, per number of rows and type of weights.

  python benchmarks/engine/matmul_forms.py

All matrix products of a model's step, one after the other as a step has them, every layer with weights of its own, so
that no cache holds what a real step would have to read.  What lies between the products is left out.  The tables of
`step_forms` in nitsum_jax/engine/step/forms.py come from this.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import flags

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.engine.decode_table import align
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.errors import InvalidInputError, NitsumError
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.matmul import MatmulChoice, MatmulForm, column_parallel, row_parallel
from nitsum_jax.models.layers.reduction import tree_sum
from nitsum_jax.models.loading import open_model
from nitsum_jax.server import cli

Weights = list[dict[str, list[jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say."""

    model: str
    vshards: int
    rows: tuple[int, ...]
    dtypes: tuple[str, ...]
    repeats: int
    give_up_ms: float
    json: str | None


@dataclasses.dataclass(frozen=True)
class Timing:
    """One form.

    Attributes:
      dtype: of the weights.
      rows: R, rows of the products.
      form: which form.
      ms: median time of all products of a step; None if it was not tried because fewer rows took too long already.
    """

    dtype: str
    rows: int
    form: str
    ms: float | None


def read_options(argv: Sequence[str]) -> Options:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_string("model", "smollm2-135m", "whose shapes", flag_values=values)
    flags.DEFINE_integer("vshards", 1, "K, virtual shards on the device", lower_bound=1, flag_values=values)
    flags.DEFINE_list("rows", ["1", "2", "8", "32", "128"], "numbers of rows", flag_values=values)
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "types of weights", flag_values=values)
    flags.DEFINE_integer("repeats", 5, "runs of each", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "give_up_ms", 1000.0, "a form slower than this at 2 rows or more is tried with no more", flag_values=values
    )
    flags.DEFINE_string("json", None, "file for the results", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    if not values.rows or not all(item.isdecimal() and int(item) for item in values.rows):
        raise InvalidInputError(f"--rows={','.join(values.rows)}: give numbers of at least 1, such as 1,8,32")
    if not values.dtypes or not set(values.dtypes) <= {"float32", "bfloat16"}:
        raise InvalidInputError(f"--dtypes={','.join(values.dtypes)}: give float32, bfloat16 or both")
    return Options(
        model=values.model,
        vshards=values.vshards,
        rows=tuple(sorted(map(int, values.rows))),
        dtypes=tuple(values.dtypes),
        repeats=values.repeats,
        give_up_ms=values.give_up_ms,
        json=values.json,
    )


def make_weights(config: ModelConfig, cut: ModelCut, dtype: str) -> tuple[Weights, list[jax.Array]]:
    """Layers and head, each weight one array per vshard; their values do not matter."""
    heads = cut.q_heads * config.head_dim
    shapes = {
        "qkv": heads + 2 * cut.kv_heads * config.head_dim,
        "out": heads,
        "gate_up": 2 * cut.d_mlp,
        "down": cut.d_mlp,
    }

    def one(rows: int) -> list[jax.Array]:
        return [jnp.full((rows, config.d_model), 0.01, dtype) for _ in range(cut.num_vshards)]

    layers = [{name: one(rows) for name, rows in shapes.items()} for _ in range(config.num_layers)]
    return layers, one(cut.vocab)


def step(form: MatmulForm, heads: int) -> Callable[[jax.Array, Weights, list[jax.Array]], list[jax.Array]]:
    """All products of a step, each fed by the one before.

    Args:
      form: for all of them.
      heads: width of a vshard's queries, the part of its q, k and v that goes into the next product.
    """
    choice = MatmulChoice(form, form)

    def run(x: jax.Array, layers: Weights, head: list[jax.Array]) -> list[jax.Array]:
        for layer in layers:
            rows = [column_parallel(x, weight, choice)[:, :heads] for weight in layer["qkv"]]
            x = x + tree_sum([row_parallel(r, w, choice) for r, w in zip(rows, layer["out"], strict=True)])
            rows = [column_parallel(x, weight, choice) for weight in layer["gate_up"]]
            rows = [r[:, : r.shape[1] // 2] for r in rows]
            x = x + tree_sum([row_parallel(r, w, choice) for r, w in zip(rows, layer["down"], strict=True)])
            x = x * jnp.float32(1e-3)  # keeps the numbers within bounds
        return [column_parallel(x, weight, choice) for weight in head]

    return run


def measure(options: Options, config: ModelConfig) -> list[Timing]:
    """Times every form; prints a line for each as it is done."""
    cut = ModelCut.of(config, options.vshards)
    found = []
    for dtype in options.dtypes:
        layers, head = make_weights(config, cut, dtype)
        slow: set[MatmulForm] = set()
        for rows in options.rows:
            for form in MatmulForm:
                if form is MatmulForm.PADDED and rows > 1:
                    continue  # the same as DOT
                ms = None if form in slow else _time(options, config, cut, rows, form, layers, head)
                if ms is not None and rows > 1 and ms > options.give_up_ms:  # one row is a case of its own
                    slow.add(form)
                found.append(Timing(dtype, rows, str(form), ms))
    return found


def _time(
    options: Options,
    config: ModelConfig,
    cut: ModelCut,
    rows: int,
    form: MatmulForm,
    layers: Weights,
    head: list[jax.Array],
) -> float:
    x = jnp.full((rows, config.d_model), 0.5, jnp.float32)
    compiled = jax.jit(step(form, cut.q_heads * config.head_dim)).lower(x, layers, head).compile()
    jax.block_until_ready(compiled(x, layers, head))
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, layers, head))
        times.append(time.perf_counter() - start)
        if sum(times) > 10 * options.give_up_ms / 1000:
            break
    return 1000 * statistics.median(times)


def fastest(timings: Sequence[Timing], dtype: str, rows: int) -> str:
    """The form with the least time."""
    mine = [(t.ms, t.form) for t in timings if (t.dtype, t.rows) == (dtype, rows) and t.ms is not None]
    return min(mine)[1]


def table(timings: Sequence[Timing], platform: str) -> str:
    """All forms beside each other, the fastest, and the one that the engine takes."""
    forms = [str(form) for form in MatmulForm]
    lines = [("rows", "weights", *(f"{form} ms" for form in forms), "fastest", "the engine takes")]
    for dtype, rows in dict.fromkeys((t.dtype, t.rows) for t in timings):
        by_form = {t.form: t.ms for t in timings if (t.dtype, t.rows) == (dtype, rows)}
        cells = ["-" if (ms := by_form.get(form)) is None else f"{ms:.1f}" for form in forms]
        taken = str(step_forms(platform, dtype).matmul.form(rows))
        lines.append((str(rows), dtype, *cells, fastest(timings, dtype, rows), taken))
    return align(lines)


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    try:
        options = read_options(argv)
        model = open_model(options.model)
        timings = measure(options, model.config)
        cli.out(f"{model.name}, vshards={options.vshards}: ms for all matrix products of a step, on {jax.devices()[0]}")
        cli.out(table(timings, jax.devices()[0].platform))
        if options.json:
            rows = [dataclasses.asdict(timing) for timing in timings]
            pathlib.Path(options.json).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
    except (NitsumError, OSError) as error:
        cli.err(f"matmul_forms: {error}")
        return cli.EXIT_USAGE
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
