"""What it costs to hold outputs to a form: engine steps with and without one, and the masks themselves.

    python benchmarks/engine/structured.py --model=smollm2-135m

For each batch the same prompts run freely, all held to a JSON schema, and half of them held: processor time per token,
and time per token of a stream, each as a share of that in the free run of the same round, as other programs disturb all
runs of a round alike.  Masks of several forms are also made alone, on one thread, along texts that these allow.  Prints
two tables.
"""

import dataclasses
import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np
from absl import app, flags

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.request import OutputForm, Request, SamplingParams, TokenDelta
from nitsum_jax.engine.step.masks import mask_words
from nitsum_jax.models.loading import open_model
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.compiler import FormCompiler

_MODEL = flags.DEFINE_string("model", "tiny-random", "Model, as for nitsum-serve.")
_BATCHES = flags.DEFINE_list("batches", ["1", "32"], "Streams at a time.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Output tokens of a stream.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Runs of each case; medians are printed.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Type of weights.")

_PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
_LONG = {"type": "array", "minItems": 1000, "items": {**_PERSON, "required": ["name", "age"]}}
_PROMPT = (1, 2, 3, 4)


def _texts(**limits: object) -> dict[str, object]:
    """A schema of many strings."""
    return {"type": "array", "minItems": 1000, "items": {"type": "string", **limits}}


_FORMS = {
    "JSON schema: objects with strings, numbers, lists": forms.json_schema(_LONG),
    "any JSON": forms.json_object(),
    "JSON schema with `maxLength` 40": forms.json_schema(_texts(maxLength=40)),
    "JSON schema with a pattern such as `^[a-z ,.]{4,40}$`": forms.json_schema(_texts(pattern="^[a-z ,.]{4,40}$")),
    "regular expression such as `[a-z ,.]{4,4000}`": forms.regex("[a-z ,.]{4,4000}"),
}


@dataclasses.dataclass(frozen=True)
class Round:
    """Milliseconds per token of a stream (median over streams) in the runs of one round.

    Attributes:
      free: where no stream is held to a form.
      held: where all are.
      held_beside_free: of those that are, where half of them are.
      free_beside_held: of the others.
      free_cpu: processor time per token, milliseconds, of the whole process, where none is held.
      held_cpu: where all are.
    """

    free: float
    held: float
    held_beside_free: float
    free_beside_held: float
    free_cpu: float
    held_cpu: float


class _Times:
    """A sink that notes when streams begin and end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.ended: set[str] = set()

    def __call__(self, deltas: Sequence[TokenDelta]) -> None:
        with self._changed:
            for delta in deltas:
                if delta.token_ids:
                    self.first.setdefault(delta.request_id, delta.time_s)
                    self.last[delta.request_id] = delta.time_s
                if delta.finish_reason is not None:
                    self.ended.add(delta.request_id)
            self._changed.notify_all()

    def wait(self, names: Sequence[str]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.ended.issuperset(names))


def measure(engine: Engine, times: _Times, form: OutputForm, batch: int, tokens: int, rounds: int) -> list[Round]:
    """The rounds at one batch size; one before them only warms up."""

    def run(held: int, number: int) -> tuple[float, float, float]:
        names = [f"{batch}-{held}-{number}-{index}" for index in range(batch)]
        start = time.process_time()
        for index, name in enumerate(names):
            sampling = SamplingParams(temperature=1.0, seed=index)
            engine.submit(Request(name, _PROMPT, tokens, sampling, form=form if index < held else None))
        times.wait(names)
        cpu = 1000 * (time.process_time() - start) / (tokens * batch)
        each = [1000 * (times.last[name] - times.first[name]) / (tokens - 1) for name in names]
        return (
            statistics.median(each[:held]) if held else 0.0,
            statistics.median(each[held:]) if held < batch else 0.0,
            cpu,
        )

    rounds_of: list[Round] = []
    for number in range(-1, rounds):
        _, free, free_cpu = run(0, number)
        held, _, held_cpu = run(batch, number)
        rounds_of.append(Round(free, held, *run(batch // 2, number)[:2], free_cpu, held_cpu))
    return rounds_of[1:]


def mask_us(form: OutputForm, vocab: int, tokens: int) -> list[float]:
    """Processor time of each token, in microseconds: following it, and making the mask behind it."""
    matcher, rng = form.matcher(), np.random.default_rng(0)
    mask = np.array(form.first_mask)
    times: list[float] = []
    while len(times) < tokens:
        if matcher.ended:
            matcher.restart()
            mask = np.array(form.first_mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        token = int(rng.choice(allowed))
        start = time.thread_time()
        matcher.accept(token)
        mask = np.zeros(mask_words(vocab), np.int32)
        if not matcher.ended:
            matcher.allowed(mask)
        times.append(1e6 * (time.thread_time() - start))
    return times


def mask_table(compiler: FormCompiler, vocab: int, tokens: int) -> str:
    """Masks of all forms as a table of Markdown."""
    lines = ["| form | mean, us | longest, us |", "|---|---|---|"]
    for name, spec in _FORMS.items():
        times = mask_us(compiler.compile(spec), vocab, tokens)
        lines.append(f"| {name} | {statistics.mean(times):.0f} | {max(times):.0f} |")
    return "\n".join(lines)


def table(measured: Sequence[tuple[int, Sequence[Round]]]) -> str:
    """All rounds as a table of Markdown: medians, and of the shares their range, too."""
    lines = [
        "| streams | CPU per token, free, ms | CPU, held / free | time, held / free | time beside held / free | "
        "time of held beside free / free |",
        "|---|---|---|---|---|---|",
    ]
    for batch, rounds in measured:
        shares = [_share([r.held_cpu / r.free_cpu for r in rounds]), _share([r.held / r.free for r in rounds])]
        if batch > 1:
            shares.append(_share([r.free_beside_held / r.free for r in rounds]))
            shares.append(_share([r.held_beside_free / r.free for r in rounds]))
        cells = [
            str(batch),
            f"{statistics.median(r.free_cpu for r in rounds):.2f}",
            *shares,
            *["-"] * (4 - len(shares)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"


def main(argv: Sequence[str]) -> None:
    """Measures and prints."""
    del argv
    batches = [int(batch) for batch in _BATCHES.value]
    model, times = open_model(_MODEL.value), _Times()
    vocab = model.config.vocab_size
    compiler = FormCompiler(model.tokenizer, vocab, model.config.eos_ids)
    print(f"a mask, {vocab} tokens in the vocabulary\n{mask_table(compiler, vocab, 2000)}\n", flush=True)
    form = compiler.compile(forms.json_schema(_LONG))
    config = EngineConfig(
        devices=1, layout="tp1", dtype=_DTYPE.value, max_batch=max(batches), prefill_chunk=32, max_model_len=512
    )
    engine = start_engine(model, config, times)
    try:
        engine.wait_for_layouts()
        measured = [(batch, measure(engine, times, form, batch, _TOKENS.value, _ROUNDS.value)) for batch in batches]
    finally:
        engine.close()
    print("per token: medians over rounds, and the range of shares\n" + table(measured))


if __name__ == "__main__":
    app.run(main)
