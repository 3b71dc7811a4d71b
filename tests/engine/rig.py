"""Single steps by hand: one program at several degrees of tensor parallelism, over the same weights and pool."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nitsum_jax.engine.kv.history import STEERED_BY
from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import StepForms, step_forms
from nitsum_jax.engine.step.masks import only
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns, steering
from nitsum_jax.engine.step.program import Program, StepState, compile_step
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank
from tests.engine.reference import Params, tiny_params
from tests.engine.step.attention_cases import int8_rows
from tests.models.checkpoint.quantised_model import QuantisedModel

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of a step.

    Attributes:
      context: tokens in the pool.
      tokens: new tokens; one of them for a decode step.
      sampling: parameters.
      stops: ids that may not be chosen yet.
      logprobs: whether they are asked for.
      allowed: tokens that may follow; None: all.
    """

    context: int
    tokens: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    stops: tuple[int, ...] = ()
    logprobs: bool = False
    allowed: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step left behind.

    Attributes:
      sampled: i32[B].
      token_logprobs: i32[B, columns].
      logits: f32[B, V padded].
      blocks: `[N, L, 2, W, G/K, A]`; of every block the copy on the device that its vshard lies on.
      history: the token history.
    """

    sampled: np.ndarray
    token_logprobs: np.ndarray
    logits: np.ndarray
    blocks: np.ndarray
    history: np.ndarray


class StepRig:
    """A tiny model cut in K vshards, with blocks of its own for every sequence, vshard and page."""

    def __init__(
        self,
        variant: str,
        dtype: str,
        *,
        kv_dtype: str | None = None,
        vshards: int = 8,
        batch: int = 16,
        max_model_len: int = 320,
        seed: int = 0,
        layers: int | None = None,
        forms: StepForms | None = None,
        model: QuantisedModel | None = None,
    ):
        if model is None:
            self.cut, self.params = tiny_params(variant, vshards, dtype, layers)
        else:
            self.cut, self.params = model.cut, model.params
        config = self.cut.config
        forms = forms or step_forms("cpu", dtype)
        one = PoolShape(
            1, config.num_layers, PAGE_SIZE, self.cut.kv_heads, config.head_dim, kv_dtype or dtype, forms.pool
        )
        pages = one.pages(max_model_len)
        pool = dataclasses.replace(one, blocks=batch * vshards * pages + 1)
        self.program = Program(
            config,
            self.cut,
            dtype,
            pool,
            batch,
            max_model_len,
            forms,
            quantised=() if model is None else model.formats,
        )
        self.vmap = VshardMap(vshards)
        self.bank = _bank(self.params, self.vmap)
        rng = np.random.default_rng(seed)
        self.page_table = rng.permutation(pool.blocks)[: batch * vshards * pages].reshape(batch, vshards, pages)
        values = rng.standard_normal((*(pool.blocks, *pool.block_shape)[:-1], config.head_dim)).astype(np.float32)
        # Any keys and values will do as a past, so that one step tells about long contexts without the steps before it.
        match pool.dtype:
            case "float32":
                self.past = values
            case "int8":
                self.past = int8_rows(values)
            case _:
                self.past = values.astype(ml_dtypes.bfloat16).view(pool.storage_dtype)
        self.compiled = functools.cache(self._compile)

    def run(self, rows: Sequence[Row], shape: StepShape, tp: int, past: np.ndarray | None = None) -> Outcome:
        """One step of an instance on devices 0 to TP-1; the pool of each of them begins as `past`.

        The first row of a mixed step is the chunk.
        """
        mesh = self.mesh(tp)
        packer = Packer(shape, self.cut.num_vshards, self.program.pages, self.program.max_batch)
        history = np.zeros(self.program.history_shape, np.int32)
        for index, row in enumerate(rows):
            columns = sampling_columns(
                row.sampling,
                row.sampling.seed or 0,
                row.context,
                min_tokens=1000 if row.stops else 0,
                logprobs=row.logprobs,
            )
            steered = steering(row.sampling, row.stops)
            decodes = shape.is_decode or index >= shape.batch
            if decodes:
                history[index, row.context] = row.tokens[0]
                history[index, STEERED_BY] = steered
            used = -(-(row.context + len(row.tokens)) // PAGE_SIZE)
            packer.add(
                columns,
                row=index,
                context=row.context,
                tokens=None if decodes else row.tokens,
                emit=True,
                page_table=self.page_table[index, :, :used],
                steering=steered,
                mask=None if row.allowed is None else _mask(row.allowed, self.program.config.vocab_size),
            )
        masks = self.program.no_masks(shape) if packer.masks is None else packer.masks
        blocks = np.concatenate([self.past if past is None else past] * tp)
        pool = jax.device_put(jnp.asarray(blocks), NamedSharding(mesh, PartitionSpec(TP_AXIS)))
        placed = jax.device_put(jnp.asarray(history), NamedSharding(mesh, PartitionSpec()))
        step = self.compiled(shape, tp)
        state, results = step(self.leaves(tp), StepState(pool, placed), packer.done(), masks)
        sampled, token_logprobs, logits = map(np.asarray, (results.tokens, results.token_logprobs, results.logits))
        by_rank = np.asarray(state.pool).reshape(tp, self.program.pool.blocks, *self.program.pool.block_shape)
        merged = by_rank[0].copy()
        for vshard in range(self.cut.num_vshards):
            ids = self.page_table[:, vshard].reshape(-1)
            merged[ids] = by_rank[vshard * tp // self.cut.num_vshards][ids]
        return Outcome(sampled, token_logprobs, logits, merged, np.asarray(state.history))

    def leaves(self, tp: int) -> tuple[jax.Array, ...]:
        """Parameters wrapped for devices 0 to TP-1."""
        wrapped = self.bank.wrap(InstanceSpec(tuple(range(tp))))
        return tuple(wrapped[name][slot or 0] for name, slot, _ in self.program.parameters(tp))

    def compile_all(self, wanted: Iterable[tuple[StepShape, int]]) -> None:
        """Compiles the steps of these shapes and degrees of parallelism on two cores."""
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            for _ in threads.map(lambda what: self.compiled(*what), dict.fromkeys(wanted)):
                pass

    def mesh(self, tp: int) -> Mesh:
        """The mesh of devices 0 to TP-1."""
        return instance_mesh(jax.devices(), InstanceSpec(tuple(range(tp))), self.vmap)

    def _compile(self, shape: StepShape, tp: int) -> jax.stages.Compiled:
        return compile_step(self.program, shape, self.mesh(tp), with_logits=True)


def _mask(tokens: tuple[int, ...], vocab: int) -> np.ndarray:
    return functools.reduce(np.bitwise_or, (only(token, vocab) for token in tokens))


def _bank(params: Params, vmap: VshardMap) -> WeightBank:
    bank = WeightBank(jax.devices(), vmap)
    everything = {device: frozenset(range(vmap.num_vshards)) for device in range(len(jax.devices()))}
    bank.load(((name, vshard, value) for (name, vshard), value in params.items()), everything)
    return bank
