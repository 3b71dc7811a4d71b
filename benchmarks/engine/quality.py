"""What fewer bits cost: perplexity of fixed texts under each quantisation, in one run.

  python benchmarks/engine/quality.py                                # the demo model; a few minutes
  python benchmarks/engine/quality.py --model=FOLDER --quantizations=none,int8

The texts are those of `nitsum-bench evals`.  The model runs over each whole text without a cache, operation by
operation, with the products that this platform's steps have.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.engine.decode_table import align
from nitsum_jax.bench.evals.texts import TEXTS
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.errors import NitsumError
from nitsum_jax.models.checkpoint.quantisation import QUANTIZATIONS
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.decoder import Decoder
from nitsum_jax.models.layers.quantised import quantise_modules
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.pack import cut_bytes, row_parallel
from nitsum_jax.server import cli


@dataclasses.dataclass(frozen=True)
class Quality:
    """One quantisation.

    Attributes:
      dtype: of what is not quantised.
      quantization: of the weights.
      megabytes: of all weights.
      perplexity: of all texts' tokens together.
      worst: largest difference of a token's log likelihood from the first one's.
    """

    dtype: str
    quantization: str
    megabytes: float
    perplexity: float
    worst: float


def likelihoods(model: OpenModel, dtype: str, quantization: str) -> tuple[np.ndarray, int]:
    """Log likelihoods of all tokens of the texts but the first of each, and the bytes of the weights."""
    config, cut = model.config, ModelCut.of(model.config, 1)
    formats = model.formats(quantization, cut)
    forms = step_forms(jax.devices()[0].platform, dtype)

    def make() -> Decoder:
        made = Decoder(config, cut, slots=1, dtype=jnp.dtype(dtype), matmul=forms.matmul)
        quantise_modules(made, formats, row_parallel(config, cut))
        return made

    graph, state = nnx.split(nnx.eval_shape(make))
    weights = {name: jnp.asarray(value) for name, _, value in model.weights(cut, dtype, formats)}
    leaves = [weights[".".join(str(p) for p in _without_slot(path))] for path, _ in nnx.to_flat_state(state)]
    decoder = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
    found = []
    for _, text in TEXTS:
        ids = np.asarray(model.tokenizer.encode(text))[None, :]
        logits = np.asarray(_logits(decoder, jnp.asarray(ids, jnp.int32)), np.float64)[0, :-1]
        top = logits.max(axis=1)
        normal = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        found.append(logits[np.arange(len(logits)), ids[0, 1:]] - normal)
    return np.concatenate(found), sum(cut_bytes(config, cut, dtype, formats))


def _without_slot(path: tuple[object, ...]) -> list[object]:
    """A parameter's path without the number of its slot, which is last but for the arrays of quantised ones."""
    if path[0] != "layers":
        return [part for part in path if not isinstance(part, int)]
    return [*path[:2], *(part for part in path[2:] if not isinstance(part, int))]


def _logits(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    length = tokens.shape[1]

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        del layer
        groups = k.shape[3]
        grouped = q.reshape(*q.shape[:3], groups, q.shape[3] // groups, q.shape[4])
        scores = jnp.einsum("btsgra,busga->bsgrtu", grouped, k) * jnp.float32(q.shape[4] ** -0.5)
        causal = jnp.tri(length, dtype=bool)[None, None, None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bsgrtu,busga->btsgra", weights, v).reshape(q.shape)

    positions = jnp.arange(length, dtype=jnp.int32)[None, :]
    x = decoder(tokens, positions, attend)
    return decoder.logits(x[0])[None]


def measure(model: OpenModel, wanted: Sequence[tuple[str, str]]) -> list[Quality]:
    """One after the other, the first being what the others are compared with."""
    found, first = [], None
    for dtype, quantization in wanted:
        logprobs, size = likelihoods(model, dtype, quantization)
        first = logprobs if first is None else first
        worst = float(np.abs(logprobs - first).max())
        found.append(Quality(dtype, quantization, size / 1e6, math.exp(-logprobs.mean()), worst))
        cli.err(f"{dtype} {quantization}: perplexity {found[-1].perplexity:.4f}")
    return found


def main(argv: Sequence[str]) -> int:
    """Returns the exit status."""
    values = flags.FlagValues()
    flags.DEFINE_string("model", "smollm2-135m", "name of a known model, a GGUF file or a model folder", values)
    flags.DEFINE_list(
        "quantizations", list(QUANTIZATIONS), "to compare, with bfloat16 for the rest", flag_values=values
    )
    try:
        cli.parse(values, argv, __doc__ or "")
        model = open_model(values.model)
        found = measure(model, [("float32", "none"), *(("bfloat16", one) for one in values.quantizations)])
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
        return cli.EXIT_OK
    except NitsumError as error:
        cli.err(f"quality: {error}")
        return cli.EXIT_USAGE
    plain = next((one.perplexity for one in found if (one.dtype, one.quantization) == ("bfloat16", "none")), None)
    lines = [("dtype", "quantization", "MB of weights", "perplexity", "of bfloat16's", "largest difference of a token")]
    for one in found:
        share = "-" if plain is None else f"{one.perplexity / plain - 1:+.2%}"
        worst = f"{one.worst:.2e}"
        lines.append((one.dtype, one.quantization, f"{one.megabytes:.1f}", f"{one.perplexity:.4f}", share, worst))
    cli.out(align(lines))
    return cli.EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv))
