"""nitsum-bench evals: asks a server how likely texts are, and compares that with transformers."""

import asyncio
import dataclasses
import math
import pathlib
from collections.abc import Sequence

import grpc.aio
from absl import flags

from nitsum_jax.bench.evals.reference import OWN, Reference, ScoredText, by_transformers, read_reference
from nitsum_jax.bench.evals.texts import TEXTS
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.server import cli
from nitsum_jax.server.client import identity_flags
from nitsum_jax.server.client.channel import does_not_serve, open_channel
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

USAGE = f"""nitsum-bench evals proves that a served model is the model: its log likelihoods of texts, token by token,
are those of transformers.

  nitsum-serve --model={OWN} --dtype=float32
  nitsum-bench evals --server=localhost:50051
  nitsum-bench evals --make=mine.json --checkpoint=FOLDER      for another model; needs transformers and torch
  nitsum-bench evals --server=localhost:50051 --reference=mine.json

Exit status 2: they differ by more than --tolerance. In bfloat16 a token of
SmolLM2-135M differs by up to 0.12."""

_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Compared:
    """A text, as the server and as the reference have it.

    Attributes:
      name: of the text.
      tokens: that have likelihoods.
      ours: mean log likelihood of a token, natural logarithm, by the server.
      theirs: the same by the reference.
      worst: largest difference of a token.
      where: the token with that difference, counted from 0.
    """

    name: str
    tokens: int
    ours: float
    theirs: float
    worst: float
    where: int


def compare(text: ScoredText, logprobs: Sequence[float]) -> Compared:
    """Compares the likelihoods of a text.

    Args:
      text: of the reference.
      logprobs: by the server, of all tokens but the first.
    """
    gaps = [abs(ours - theirs) for ours, theirs in zip(logprobs, text.logprobs, strict=True)]
    worst = max(range(len(gaps)), key=lambda index: math.inf if math.isnan(gaps[index]) else gaps[index])
    count = len(gaps)
    return Compared(text.name, count, sum(logprobs) / count, sum(text.logprobs) / count, gaps[worst], worst + 1)


def table(found: Sequence[Compared]) -> str:
    """For people."""
    rows = ["text                tokens   perplexity   reference   largest difference of a token"]
    rows += [
        f"{one.name:<18} {one.tokens:>7} {math.exp(-one.ours):>12.4f} {math.exp(-one.theirs):>11.4f}   "
        f"{one.worst:.2e} (token {one.where})"
        for one in found
    ]
    return "\n".join(rows)


def run(argv: Sequence[str]) -> None:
    """Runs the subcommand.

    Raises:
      NitsumError: flags are wrong, the server cannot be reached, or its model is another.
    """
    values = flags.FlagValues()
    identity_flags.define(values)
    flags.DEFINE_string("reference", None, f"file of --make; that of {OWN} if not given", flag_values=values)
    flags.DEFINE_float("tolerance", 1e-3, "most that a token may differ by", lower_bound=0, flag_values=values)
    flags.DEFINE_string("make", None, "file to write: what transformers says of --checkpoint", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "Hugging Face folder or name, for --make", flag_values=values)
    cli.parse(values, argv, USAGE)
    if (values.make is None) != (values.checkpoint is None):
        raise InvalidInputError("--make and --checkpoint belong together")
    if values.make is not None:
        made = by_transformers(values.checkpoint, TEXTS)
        pathlib.Path(values.make).write_text(made.as_json(), encoding="utf-8")
        cli.out(f"wrote {values.make}: {len(made.texts)} texts, by {made.made_by}")
        return
    reference = read_reference(values.reference)
    try:
        found = asyncio.run(_ask(values, reference))
    except grpc.aio.AioRpcError as error:
        raise does_not_serve(values.server, error) from None
    cli.out(table(found))
    wrong = max(found, key=lambda one: math.inf if math.isnan(one.worst) else one.worst)
    if not wrong.worst <= values.tolerance:
        raise PreconditionError(
            f"the model at {values.server} is not {reference.model} as {reference.made_by} has it: {wrong.name} "
            f"differs by {wrong.worst:.2g} at token {wrong.where}; a server in bfloat16 rounds, so start it with "
            "--dtype=float32, or give a larger --tolerance"
        )
    cli.out(f"all tokens within {values.tolerance:g} of {reference.made_by}")


async def _ask(values: flags.FlagValues, reference: Reference) -> list[Compared]:
    async with open_channel(values.server, identity_flags.read(values)) as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        return [await _score(stub, text) for text in reference.texts]


async def _score(stub: nitsum_pb2_grpc.GenerationServiceStub, text: ScoredText) -> Compared:
    request = nitsum_pb2.GenerateRequest(text=text.text, max_tokens=1, prompt_logprobs=0, return_prompt_ids=True)
    ids: list[int] = []
    logprobs: list[float] = []
    async for event in stub.Generate(request, timeout=_TIMEOUT_S, wait_for_ready=False):
        if event.HasField("started"):
            ids = list(event.started.prompt_ids)
        elif event.HasField("finished"):
            logprobs = [one.logprob for one in event.finished.prompt_logprobs]
    if ids != list(text.ids):
        where = next((n for n, pair in enumerate(zip(ids, text.ids, strict=False)) if pair[0] != pair[1]), len(ids))
        raise PreconditionError(
            f"the server's tokenizer is another: of {text.name} it makes {len(ids)} tokens, the reference "
            f"{len(text.ids)}, and they differ at token {where}"
        )
    if len(logprobs) != len(text.logprobs):
        raise PreconditionError(
            f"the server told {len(logprobs)} likelihoods of {text.name}, where {len(text.logprobs)} were asked for: "
            "it is of another version"
        )
    return compare(text, logprobs)
