"""One step of an instance as a pure function: tokens in, the KV pool updated, the next token of every row out."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.engine.kv.history import STEERED_BY, TOKENS
from nitsum_jax.engine.step import logprobs, sampling
from nitsum_jax.engine.step.attention import PoolShape, contained, paged_attention, write_tokens
from nitsum_jax.engine.step.forms import AttentionForm, StepForms
from nitsum_jax.engine.step.masks import mask_words, no_masks
from nitsum_jax.engine.step.packing import STEERING, StepInputs, StepShape, packed_shape, split, unpack
from nitsum_jax.engine.step.pooling import pool_tokens
from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.checkpoint.blocks import QuantFormat
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.layers.decoder import Decoder
from nitsum_jax.models.layers.quantised import quantise_modules
from nitsum_jax.models.layers.reduction import Ranks
from nitsum_jax.models.pack import row_parallel
from nitsum_jax.models.pooling import Pooling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepState:
    """What steps hand on to the next ones on the device; a step is given it for good, and updates it in place.

    Attributes:
      pool: the KV pool, `[N, L, 2, W, G/K, A]` per device in storage type.
      history: i32[rows, columns], the token history; see `history`.
    """

    pool: jax.Array
    history: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepResults:
    """What a step tells the host.

    Attributes:
      tokens: i32[rows], sampled; NO_TOKEN where a logit is NaN or infinite.
      token_logprobs: i32[rows, columns], `logprobs.token_logprobs` where rows ask for them, else zeros.
      logits: f32[rows, V padded], of each row's last new token, from a step that was compiled with them.
      pooled: f32[B, D] of a step with a chunk, if the program pools: what `pool_tokens` makes of its new tokens.
    """

    tokens: jax.Array
    token_logprobs: jax.Array
    logits: jax.Array | None = None
    pooled: jax.Array | None = None


StepFunction = Callable[[tuple[jax.Array, ...], StepState, jax.Array, jax.Array], tuple[StepState, StepResults]]


class SampledRows(NamedTuple):
    """What choosing the next tokens needs of all rows of a step; see `StepInputs`."""

    row: jax.Array
    emit: jax.Array
    logprobs: jax.Array
    sampling: sampling.SamplingArrays


class Parameter(NamedTuple):
    """A parameter as a step takes it: its name, its slot (None: replicated) and its sharding."""

    name: str
    slot: int | None
    spec: PartitionSpec


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that a step's code depends on beside its bucket and its devices.

    Attributes:
      config: the model.
      cut: how it is cut in virtual shards.
      dtype: type of weights, float32 or bfloat16.
      pool: shape of one device's KV pool.
      max_batch: rows of the token history, without the dummy row.
      max_model_len: longest prompt and output together, in tokens.
      forms: in which it is written.
      fast_sums: sums over devices in whatever order and in bfloat16, see `Ranks`.
      pooling: how prompts become embeddings; None: they do not.
      quantised: names and formats of the parameters that are kept in few bits.
    """

    config: ModelConfig
    cut: ModelCut
    dtype: str
    pool: PoolShape
    max_batch: int
    max_model_len: int
    forms: StepForms = StepForms()
    fast_sums: bool = False
    pooling: Pooling | None = None
    quantised: tuple[tuple[str, QuantFormat], ...] = ()

    @property
    def pages(self) -> int:
        """P, pages of a block table."""
        return self.pool.pages(self.max_model_len)

    @property
    def history_shape(self) -> tuple[int, int]:
        """Shape of an instance's token history: tokens, then the steering of the sequence (see `packing`).

        The last row is the dummy of padding rows.
        """
        return self.max_batch + 1, self.max_model_len + 1 + STEERING

    def pools(self, shape: StepShape) -> bool:
        """Whether a step tells what is pooled of its new tokens."""
        return self.pooling is not None and not shape.is_decode

    def ranks(self, tp: int) -> Ranks:
        """The devices that run a step together."""
        return Ranks(tp, TP_AXIS, self.fast_sums, self.forms.gather_limit_bytes)

    def no_masks(self, shape: StepShape) -> np.ndarray:
        """What a step takes of which no row has a mask, i32[rows, W]; see `masks`."""
        return no_masks(shape.rows, self.config.vocab_size)

    def decoder(self, tp: int) -> tuple[nnx.GraphDef, nnx.State]:
        """Structure and abstract parameters of one rank's part of the model."""
        return _decoder(self, tp)

    def parameters(self, tp: int) -> list[Parameter]:
        """Every parameter, in the order a step takes them."""
        return _parameters(self, tp)


@functools.cache
def _decoder(program: Program, tp: int) -> tuple[nnx.GraphDef, nnx.State]:
    # Cached: building the modules of a model takes seconds, and every bucket and group of devices asks for them.
    def make() -> Decoder:
        model = Decoder(
            program.config,
            program.cut,
            slots=program.cut.num_vshards // tp,
            dtype=jnp.dtype(program.dtype),
            ranks=program.ranks(tp),
            matmul=program.forms.matmul,
        )
        quantise_modules(model, dict(program.quantised), row_parallel(program.config, program.cut))
        return model

    return nnx.split(nnx.eval_shape(make))


@functools.cache
def _parameters(program: Program, tp: int) -> list[Parameter]:
    _, state = program.decoder(tp)
    specs = dict(nnx.to_flat_state(nnx.get_partition_spec(state)))
    found: list[Parameter] = []
    for path, _ in nnx.to_flat_state(state):
        spec = specs[path].get_value()
        if TP_AXIS not in spec:
            found.append(Parameter(".".join(map(str, path)), None, PartitionSpec()))
            continue
        # The number of a slot is last, but for the arrays of a quantised parameter.
        at = len(path) - (1 if isinstance(path[-1], int) else 2)
        found.append(Parameter(".".join(map(str, (*path[:at], *path[at + 1 :]))), int(str(path[at])), spec))
    return found


def step_function(program: Program, shape: StepShape, tp: int, *, with_logits: bool = False) -> StepFunction:
    """The step as one rank runs it, under `jax.shard_map`.

    Returns:
      A function of (parameters, state, packed inputs, masks) to (state, results).
    """
    graph, _ = program.decoder(tp)
    slots = program.cut.num_vshards // tp
    ranks = program.ranks(tp)
    attention = _attention(program)

    def step(
        leaves: tuple[jax.Array, ...], state: StepState, packed: jax.Array, masks: jax.Array
    ) -> tuple[StepState, StepResults]:
        pool, history = state.pool, state.history
        model = nnx.merge(graph, _state(program, tp, leaves))
        vshards, pages = program.cut.num_vshards, program.pages
        arrays = split(packed, shape, vshards, pages)
        parts = [unpack(array, part, vshards, pages) for array, part in zip(arrays, shape.parts, strict=True)]
        first = ranks.index() * jnp.int32(slots)
        tables = [jax.lax.dynamic_slice_in_dim(part.page_table, first, slots, axis=1) for part in parts]
        tokens = [
            history[part.row, part.context][:, None] if of.is_decode else part.tokens
            for of, part in zip(shape.parts, parts, strict=True)
        ]
        new: list[jax.Array] = []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            k, v = contained(k, v)
            new.append(jnp.stack([k, v], axis=3))
            apart = zip(_apart(q, shape), _apart(k, shape), _apart(v, shape), tables, parts, strict=True)
            return _together([attention(*qkv, pool, layer, table, part.context) for *qkv, table, part in apart])

        positions = [
            part.context[:, None] + jnp.arange(of.tokens, dtype=jnp.int32)[None, :]
            for of, part in zip(shape.parts, parts, strict=True)
        ]
        x = model(_together(tokens), _together(positions), attend)
        last = [
            rows[jnp.arange(rows.shape[0]), jnp.maximum(part.new_tokens - 1, 0)]
            for rows, part in zip(_apart(x, shape), parts, strict=True)
        ]
        logits = model.logits(_stacked(*last))
        pooled = None
        if program.pools(shape):
            pooled = pool_tokens(model.normed, _apart(x, shape)[0], parts[0].new_tokens, program.pooling)
        if not shape.is_decode:
            history = _note_prompt(history, parts[0], tokens[0])
        whole = jax.tree.map(_stacked, *(SampledRows(p.row, p.emit, p.logprobs, p.sampling) for p in parts))
        sampled = _sample(logits, model.vocab_offset(), program.config.vocab_size, whole, history, masks, ranks)
        token_logprobs = _token_logprobs(logits, sampled, whole, ranks)

        # XLA updates the pool in place only if it can tell that every read comes first.  The last layer's reads do not
        # feed the new keys and values, so the tie is made by hand: nothing is below NO_TOKEN, but the compiler cannot
        # know.
        tie = jnp.any(sampled < sampling.NO_TOKEN).astype(jnp.int32)
        for written, table, part in zip(_apart(jnp.stack(new, axis=3), shape), tables, parts, strict=True):
            pool = write_tokens(pool, written, table, part.context + tie, part.new_tokens, program.pool)
        history = _note_sampled(history, whole, sampled)
        return StepState(pool, history), StepResults(
            sampled, token_logprobs, ranks.concat_last(logits) if with_logits else None, pooled
        )

    return step


def compile_step(
    program: Program, shape: StepShape, mesh: Mesh, *, with_logits: bool = False, name: str = "step"
) -> jax.stages.Compiled:
    """Compiles a step ahead of time for the devices of `mesh` (see `instance_mesh`).

    The name is part of the key under which JAX's persistent cache keeps it.
    """
    tp = mesh.devices.size
    along, everywhere = PartitionSpec(TP_AXIS), PartitionSpec()
    parameters = program.parameters(tp)
    _, modules = program.decoder(tp)
    abstract = []
    for leaf, (_, slot, spec) in zip(jax.tree.leaves(modules), parameters, strict=True):
        first = leaf.shape[0] * (tp if slot is not None else 1)
        sharding = NamedSharding(mesh, spec)
        abstract.append(jax.ShapeDtypeStruct((first, *leaf.shape[1:]), leaf.dtype, sharding=sharding))
    pool = (program.pool.blocks * tp, *program.pool.block_shape)
    # The same structures as in a step, with shapes and specs for leaves.
    state: Callable[..., object] = StepState
    results: Callable[..., object] = StepResults
    arguments = (
        tuple(abstract),
        state(
            pool=jax.ShapeDtypeStruct(pool, program.pool.storage_dtype, sharding=NamedSharding(mesh, along)),
            history=jax.ShapeDtypeStruct(program.history_shape, jnp.int32, sharding=NamedSharding(mesh, everywhere)),
        ),
        jax.ShapeDtypeStruct(
            packed_shape(shape, program.cut.num_vshards, program.pages),
            jnp.int32,
            sharding=NamedSharding(mesh, everywhere),
        ),
        jax.ShapeDtypeStruct(
            (shape.rows, mask_words(program.config.vocab_size)), jnp.int32, sharding=NamedSharding(mesh, everywhere)
        ),
    )
    mapped = jax.shard_map(
        step_function(program, shape, tp, with_logits=with_logits),
        mesh=mesh,
        in_specs=(tuple(parameter.spec for parameter in parameters), state(along, everywhere), everywhere, everywhere),
        out_specs=(
            state(along, everywhere),
            results(
                everywhere,
                everywhere,
                everywhere if with_logits else None,
                everywhere if program.pools(shape) else None,
            ),
        ),
        check_vma=False,
    )
    mapped.__name__ = name
    # None where there are none: that is what tests and JAX's persistent cache know as a plain compilation.
    return jax.jit(mapped, donate_argnums=1).lower(*arguments).compile(dict(program.forms.compile_options) or None)


def _together(parts: Sequence[jax.Array]) -> jax.Array:
    """`[B, T, ...]` of each part as the model takes them: all tokens of a mixed step are rows of one product."""
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate([part.reshape(1, -1, *part.shape[2:]) for part in parts], axis=1)


def _apart(whole: jax.Array, shape: StepShape) -> list[jax.Array]:
    """Undoes `_together`."""
    if not shape.is_mixed:
        return [whole]
    found, start = [], 0
    for part in shape.parts:
        end = start + part.batch * part.tokens
        found.append(whole[:, start:end].reshape(part.batch, part.tokens, *whole.shape[2:]))
        start = end
    return found


def _stacked(*rows: jax.Array) -> jax.Array:
    return jnp.concatenate(rows) if len(rows) > 1 else rows[0]


def _attention(program: Program) -> Callable[..., jax.Array]:
    if program.forms.attention is AttentionForm.XLA:
        return functools.partial(paged_attention, shape=program.pool)
    # Only where it is used: it loads the compilers of kernels.
    from nitsum_jax.engine.step.paged.kernels import by_form

    return functools.partial(by_form(program.forms.attention), shape=program.pool)


def _state(program: Program, tp: int, leaves: tuple[jax.Array, ...]) -> nnx.State:
    _, abstract = program.decoder(tp)
    state: nnx.State = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return state


def _sample(
    logits: jax.Array,
    offset: jax.Array,
    vocab: int,
    inputs: SampledRows,
    history: jax.Array,
    masks: jax.Array,
    ranks: Ranks,
) -> jax.Array:
    def everything(logits: jax.Array) -> jax.Array:
        # Every rank samples from the whole vocabulary; they all find the same token.
        full = _whole(logits, ranks)
        rows = history[inputs.row]
        token = sampling.sample(full, inputs.sampling, rows[:, TOKENS], rows[:, STEERED_BY], masks)
        return jnp.where(sampling.sound(full, 0, vocab), token, sampling.NO_TOKEN)

    def greedy(logits: jax.Array) -> jax.Array:
        value, token = sampling.greedy_local(logits, offset, vocab)
        return sampling.combine(value, token, ranks.axis if ranks.size > 1 else None)

    return jax.lax.cond(sampling.all_greedy(inputs.sampling, inputs.emit), greedy, everything, logits)


def _token_logprobs(logits: jax.Array, sampled: jax.Array, inputs: SampledRows, ranks: Ranks) -> jax.Array:
    wanted = inputs.logprobs & inputs.emit

    def some(logits: jax.Array) -> jax.Array:
        return logprobs.token_logprobs(_whole(logits, ranks), sampled, wanted)

    def none(logits: jax.Array) -> jax.Array:
        return jnp.zeros((logits.shape[0], logprobs.COLUMNS), jnp.int32)

    return jax.lax.cond(jnp.any(wanted), some, none, logits)


def _whole(logits: jax.Array, ranks: Ranks) -> jax.Array:
    """f32[B, V padded], the same on every rank; the barrier keeps XLA from fusing with what differs between layouts."""
    return jax.lax.optimization_barrier(ranks.concat_last(logits))


def _note_prompt(history: jax.Array, inputs: StepInputs, tokens: jax.Array) -> jax.Array:
    """Puts a prefill step's tokens, and what steers the choice of the next ones, into the token history."""
    columns = history.shape[1]
    step = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    position = jnp.where(step < inputs.new_tokens[:, None], inputs.context[:, None] + step, jnp.int32(columns))
    history = history.at[inputs.row[:, None], position].set(tokens, mode="drop")
    return history.at[inputs.row, STEERED_BY].set(inputs.steering)


def _note_sampled(history: jax.Array, inputs: SampledRows, sampled: jax.Array) -> jax.Array:
    """Puts the sampled tokens into the token history; a row without one goes nowhere, and until then it needs an id."""
    sampled = jnp.maximum(sampled, 0)
    position = jnp.where(inputs.emit, inputs.sampling.position, jnp.int32(history.shape[1]))
    return history.at[inputs.row, position].set(sampled, mode="drop")
