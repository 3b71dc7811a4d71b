"""What it would cost in accuracy to keep activations between products in bfloat16.

  python benchmarks/engine/activation_types.py --layers=32

Logits of a decoder with random bfloat16 weights on random prompts, with what is added up between its blocks in float32,
as steps have it, and rounded to bfloat16, each against all of it in float32.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.engine.decode_table import align
from nitsum_jax.errors import NitsumError
from nitsum_jax.models.config import ModelConfig, Rope
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.decoder import Decoder
from nitsum_jax.models.layers.rope import inverse_frequencies, rotations
from nitsum_jax.server import cli

_PROMPTS, _TOKENS = 2, 48


def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention of a prompt to itself, in float32."""
    batch, length, slots, heads, width = q.shape
    q = q.reshape(batch, length, slots, k.shape[3], heads // k.shape[3], width)
    scores = jnp.einsum("btsgha,busga->bsghtu", q, k, precision="highest") * jnp.float32(width**-0.5)
    weights = jax.nn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bsghtu,busga->btsgha", weights, v, precision="highest")
    return out.reshape(batch, length, slots, heads, width)


def logits(model: Decoder, tokens: jax.Array, kept: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    """f64[tokens, V]; `kept` is what becomes of an activation before the next product takes it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    config = model.config
    rotation = rotations(positions, inverse_frequencies(Rope(config.rope_theta, config.rope_scaling), config.head_dim))
    x = kept(model.embed.table[0][...][tokens].astype(jnp.float32))
    for layer, block in enumerate(model.layers):

        def of_layer(q: jax.Array, k: jax.Array, v: jax.Array, layer: int = layer) -> jax.Array:
            return attend(layer, q, k, v)

        x = kept(x + kept(model.ranks.sum(block.attn(x, rotation, of_layer, model))))
        x = kept(x + kept(model.ranks.sum(block.mlp(x, model))))
    return np.asarray(model.logits(x.reshape(-1, x.shape[-1])), np.float64)


def row(name: str, found: np.ndarray, exact: np.ndarray) -> list[str]:
    """A line of the table: how far logits and the distributions of the next token are from exact ones."""
    log_exact, log_found = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact, found))
    divergence = (np.exp(log_exact) * (log_exact - log_found)).sum(-1).mean()
    error = np.sqrt(((found - exact) ** 2).mean()) / exact.std()
    return [name, f"{error:.4f}", f"{divergence:.1e}"]


def main(argv: Sequence[str]) -> int:
    """Prints the table; see the module."""
    try:
        compare(argv)
    except cli.HelpRequested as help_text:
        cli.out(str(help_text))
    except NitsumError as error:
        cli.err(f"activation_types: {error}")
        return cli.EXIT_USAGE
    return cli.EXIT_OK


def compare(argv: Sequence[str]) -> None:
    """Makes the table."""
    values = flags.FlagValues()
    flags.DEFINE_integer("layers", 32, "of the decoder", 1, flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    config = ModelConfig("random", "llama", values.layers, 512, 1408, 8, 4, 64, 2048, 1024)
    model = Decoder(config, ModelCut.of(config, 1), slots=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    wide = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), state))
    tokens = jax.random.randint(jax.random.key(1), (_PROMPTS, _TOKENS), 0, config.vocab_size)

    def rounded(x: jax.Array) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(jnp.float32)

    exact = logits(wide, tokens, lambda x: x)
    cli.out(
        align(
            [
                ["between products", "error of logits / their deviation", "KL divergence"],
                row("float32", logits(model, tokens, lambda x: x), exact),
                row("bfloat16", logits(model, tokens, rounded), exact),
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
