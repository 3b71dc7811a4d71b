"""What the engine is compared with: the decoder over whole sequences without a cache, and the plainest loop."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.config import AttentionVariant, ModelConfig
from nitsum_jax.models.config_readers.hf import config_from_hf
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.decoder import Decoder
from nitsum_jax.models.layers.reduction import Ranks
from nitsum_jax.models.pack import pack
from tests.models.golden import tiny_models

Params = dict[tuple[str, int | None], np.ndarray]
# Sequences of the reference loop are padded to this length, so that one compilation serves them all.
REFERENCE_LENGTH = 128
# For programs that run once: they compile in a third of the time.
_COMPILE_FAST: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


class ArraySource:
    """Tensors in memory, as a checkpoint would give them."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name][start:stop]

    def read_columns(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name][:, start:stop]


def tiny_config(variant: str) -> ModelConfig:
    """The config of a tiny model."""
    return config_from_hf(tiny_models.VARIANTS[variant], variant)


def tiny_params(
    variant: str, num_vshards: int, dtype: str = "float32", layers: int | None = None
) -> tuple[ModelCut, Params]:
    """A tiny model cut in K vshards: host arrays by parameter name and vshard (None: replicated).

    Args:
      variant: which one.
      num_vshards: K.
      dtype: of the matrices.
      layers: its first ones; None: all.
    """
    config = tiny_config(variant)
    config = config if layers is None else dataclasses.replace(config, num_layers=layers)
    cut = ModelCut.of(config, num_vshards)
    source = ArraySource(tiny_models.tensors(variant))
    return cut, {(name, vshard): np.asarray(value) for name, vshard, value in pack(config, cut, source, dtype)}


def split_decoder(cut: ModelCut, tp: int) -> tuple[nnx.GraphDef, nnx.State, list[tuple[str, int | None]]]:
    """Structure and abstract parameters of one rank's part; name and slot (None: replicated) of every parameter."""

    def make() -> Decoder:
        slots = cut.num_vshards // tp
        return Decoder(cut.config, cut, slots=slots, ranks=Ranks(tp, TP_AXIS), rngs=nnx.Rngs(0))

    graph, state = nnx.split(nnx.eval_shape(make))
    names: list[tuple[str, int | None]] = []
    for path, _ in nnx.to_flat_state(state):
        *parts, last = path
        if isinstance(last, int):
            names.append((".".join(map(str, parts)), last))
        else:
            names.append((".".join(map(str, path)), None))
    return graph, state, names


def causal_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, variant: AttentionVariant = AttentionVariant()
) -> jax.Array:
    """Plain attention of T tokens over themselves: the form without a cache.

    Args:
      q: f32[B, T, S, H/K, A].
      k: f32[B, T, S, G/K, A].
      v: as k.
      variant: what a token sees, and how its scores are made.

    Returns:
      f32[B, T, S, H/K, A].
    """
    batch, length, slots, heads, width = q.shape
    groups = k.shape[3]
    q = q.reshape(batch, length, slots, groups, heads // groups, width)
    scores = jnp.einsum("btsgra,busga->bsgrtu", q, k) * jnp.float32(variant.scale_of(width))
    if variant.soft_cap is not None:
        scores = variant.soft_cap * jnp.tanh(scores / variant.soft_cap)
    seen = jnp.tri(length, dtype=bool) & ~jnp.tri(length, k=-(variant.window or length), dtype=bool)
    scores = jnp.where(seen[None, None, None, None], scores, -jnp.inf)
    out = jnp.einsum("bsgrtu,busga->btsgra", jax.nn.softmax(scores, axis=-1), v)
    return out.reshape(batch, length, slots, heads, width)


def decoder_logits(cut: ModelCut, params: Params, tokens: np.ndarray, tp: int = 1) -> np.ndarray:
    """Logits f32[B, T, V] of whole sequences i32[B, T] by `Decoder` and `causal_attend` on `tp` devices."""
    return _Forward(cut, params, tp, runs_once=True)(tokens)


class _Forward:
    def __init__(self, cut: ModelCut, params: Params, tp: int, *, runs_once: bool):
        self._options = _COMPILE_FAST if runs_once else None
        graph, state, names = split_decoder(cut, tp)
        slots = cut.num_vshards // tp
        self._mesh = Mesh(np.array(jax.devices()[:tp]), (TP_AXIS,))
        self._vocab = cut.config.vocab_size
        leaves, specs = [], []
        for name, slot in names:
            # Slot j of rank r holds vshard r * K/TP + j; ranks lie along the leading axis.
            if slot is None:
                value, spec = params[name, None], PartitionSpec()
            else:
                value = np.concatenate([params[name, rank * slots + slot] for rank in range(tp)])
                spec = PartitionSpec(TP_AXIS)
            leaves.append(jax.device_put(value, NamedSharding(self._mesh, spec)))
            specs.append(spec)
        self._leaves = tuple(leaves)

        def forward(leaves: tuple[jax.Array, ...], tokens: jax.Array) -> jax.Array:
            model: Decoder = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), leaves))
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
            x = model(tokens, positions, lambda layer, q, k, v: causal_attend(q, k, v, cut.config.attention_of(layer)))
            logits = model.logits(x.reshape(-1, x.shape[-1]))
            return model.ranks.concat_last(logits).reshape(*tokens.shape, -1)

        self._mapped = jax.jit(
            jax.shard_map(
                forward,
                mesh=self._mesh,
                in_specs=(tuple(specs), PartitionSpec()),
                out_specs=PartitionSpec(),
                check_vma=False,
            )
        )
        self._compiled: dict[tuple[int, ...], jax.stages.Compiled] = {}

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        placed = jax.device_put(tokens.astype(np.int32), NamedSharding(self._mesh, PartitionSpec()))
        if tokens.shape not in self._compiled:
            lowered = self._mapped.lower(self._leaves, placed)
            self._compiled[tokens.shape] = lowered.compile(self._options)
        return np.asarray(self._compiled[tokens.shape](self._leaves, placed))[..., : self._vocab]


@functools.cache
def _whole_model(variant: str) -> _Forward:
    return _Forward(*tiny_params(variant, 1), 1, runs_once=False)


def generate(variant: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[list[int]], float]:
    """Greedy answers of a tiny model, each token from a forward pass over everything before it.

    Returns:
      `max_tokens` ids per prompt, and the smallest gap between a best and a second best logit that decided one of them.
    """
    model = _whole_model(variant)
    tokens = np.zeros((len(prompts), REFERENCE_LENGTH), np.int32)
    ends = np.array([len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    smallest = np.inf
    for _ in range(max_tokens):
        last = model(tokens)[np.arange(len(prompts)), ends - 1]
        best = np.sort(last, axis=-1)[:, -2:]
        smallest = min(smallest, float((best[:, 1] - best[:, 0]).min()))
        tokens[np.arange(len(prompts)), ends] = last.argmax(-1)
        ends += 1
    answers = [row[end - max_tokens : end].tolist() for row, end in zip(tokens, ends, strict=True)]
    return answers, smallest


def random_prompts(count: int, lengths: tuple[int, int], vocab: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random ids, with lengths from `lengths[0]` to `lengths[1]` inclusive."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(lengths[0], lengths[1] + 1, count)
    return [tuple(int(token) for token in rng.integers(0, vocab, size)) for size in sizes]
