"""One step of a model with random weights, ready to be run again and again."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.attention import PoolShape, encode
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.engine.step.program import Program, StepState, compile_step
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.meshes.weight_bank import WeightBank
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut

PAGE_SIZE = 16
_WARM_UP, _STEPS, _ROUNDS = 3, 10, 3


Weights = dict[tuple[str, int | None], np.ndarray]


def program_of(
    config: ModelConfig, vshards: int, dtype: str, platform: str, *, max_batch: int, max_len: int, attention: str
) -> Program:
    """What a `TimedModel` runs; its attention is as the platform and the shapes allow."""
    cut = ModelCut.of(config, vshards)
    forms = step_forms(platform, dtype, attention)
    one = PoolShape(1, config.num_layers, PAGE_SIZE, cut.kv_heads, config.head_dim, dtype, forms.pool)
    pool = dataclasses.replace(one, blocks=max_batch * vshards * one.pages(max_len))
    forms = fitting(forms, attention, pool, q_heads=cut.q_heads, most_new_tokens=max_len)
    return Program(config, cut, dtype, pool, max_batch, max_len, forms)


class TimedModel:
    """A model on devices that run it at a TP of their number, cut in K vshards that are separate buffers."""

    def __init__(
        self,
        config: ModelConfig,
        vshards: int,
        dtype: str,
        devices: Sequence[jax.Device],
        *,
        max_batch: int,
        max_len: int,
        attention: str = "auto",
        weights: Weights | None = None,
    ):
        """Puts weights on the devices.

        Args:
          config: shapes.
          vshards: K, a multiple of the number of devices.
          dtype: of weights and KV.
          devices: where.
          max_batch: sequences.
          max_len: tokens of each.
          attention: what attends, see `forms.step_forms`.
          weights: those of another model (`weights()`); None: random ones are made on the one device.
        """
        self.program = program_of(
            config,
            vshards,
            dtype,
            devices[0].platform,
            max_batch=max_batch,
            max_len=max_len,
            attention=attention,
        )
        self._tp = len(devices)
        vmap, everyone = VshardMap(vshards), InstanceSpec(tuple(range(self._tp)))
        self._mesh = instance_mesh(devices, everyone, vmap)
        self._parameters = self.program.parameters(self._tp)
        if weights is None:
            self._leaves = self._random_leaves()
        else:
            bank = WeightBank(devices, vmap)
            bank.load(
                ((name, vshard, value) for (name, vshard), value in weights.items()),
                {device: range(vshards) for device in everyone.devices},
            )
            wrapped = bank.wrap(everyone)
            self._leaves = tuple(wrapped[name][slot or 0] for name, slot, _ in self._parameters)

    def weights(self) -> Weights:
        """Host copies, by parameter and vshard; of a model on one device."""
        return {
            (name, slot): np.asarray(leaf) for leaf, (name, slot, _) in zip(self._leaves, self._parameters, strict=True)
        }

    def logits(self, tokens: np.ndarray, context: int = 0) -> np.ndarray:
        """f32[B, V]: logits of a step.

        Args:
          tokens: i32[B, T], new tokens of each sequence.
          context: tokens of each in the cache, whose keys and values are random.
        """
        shape = StepShape(*tokens.shape)
        compiled = compile_step(self.program, shape, self._mesh, with_logits=True)
        state = self._state(filled=True, current=(context, tokens[:, 0]) if shape.is_decode else None)
        _, results = compiled(self._leaves, state, self._packed(shape, context, tokens), self._masks(shape))
        return np.asarray(results.logits)[: shape.batch, : self.program.config.vocab_size]

    def step_ms(self, shape: StepShape, context: int) -> float:
        """Milliseconds of a step behind `context` tokens: median of rounds of steps that the host does not wait for."""
        compiled = compile_step(self.program, shape, self._mesh)
        packed = self._packed(shape, context, np.ones((shape.batch, shape.tokens), np.int32))
        state, masks = self._state(), self._masks(shape)
        times = []
        for steps in (_WARM_UP, *[_STEPS] * _ROUNDS):
            start = time.perf_counter()
            for _ in range(steps):
                state, results = compiled(self._leaves, state, packed, masks)
            jax.block_until_ready(results.tokens)
            times.append((time.perf_counter() - start) / steps)
        return 1000 * statistics.median(times[1:])

    def _state(self, *, filled: bool = False, current: tuple[int, np.ndarray] | None = None) -> StepState:
        """Pool and history; with random keys and values, or with the tokens that a decode step finds at a position."""
        shape = self.program.pool
        along, everywhere = (NamedSharding(self._mesh, spec) for spec in (PartitionSpec(TP_AXIS), PartitionSpec()))
        whole = (shape.blocks * self._tp, *shape.block_shape)
        pool = jnp.zeros(whole, shape.storage_dtype, device=along)
        if filled:
            values = np.random.default_rng(1).standard_normal((shape.blocks, *shape.block_shape)).astype(np.float32)
            on_one = jax.device_put(encode(jnp.asarray(values), shape), self._mesh.devices.flat[0])
            parts = [jax.device_put(on_one, device) for device in self._mesh.devices.flat]  # the same blocks on each
            pool = jax.make_array_from_single_device_arrays(whole, along, parts)
        history = np.zeros(self.program.history_shape, np.int32)
        if current is not None:
            position, tokens = current
            history[: len(tokens), position] = tokens
        return StepState(pool=pool, history=jax.device_put(history, everywhere))

    def _masks(self, shape: StepShape) -> jax.Array:
        return jax.device_put(self.program.no_masks(shape), NamedSharding(self._mesh, PartitionSpec()))

    def _packed(self, shape: StepShape, context: int, tokens: np.ndarray) -> np.ndarray:
        vshards = self.program.cut.num_vshards
        packer = Packer(shape, vshards, self.program.pages, self.program.max_batch)
        used = -(-(context + shape.tokens) // PAGE_SIZE)
        columns = sampling_columns(SamplingParams(temperature=0.0), 0, context)
        for row in range(shape.batch):
            first = row * vshards * self.program.pages
            page_table = first + np.arange(vshards * self.program.pages, dtype=np.int32).reshape(
                vshards, self.program.pages
            )
            new = None if shape.is_decode else tokens[row].tolist()
            packer.add(columns, row=row, context=context, tokens=new, emit=True, page_table=page_table[:, :used])
        return packer.done()

    def _random_leaves(self) -> tuple[jax.Array, ...]:
        _, state = self.program.decoder(self._tp)
        key = jax.random.key(0)
        return tuple(
            _random(jax.random.fold_in(key, index), leaf.shape, leaf.dtype, NamedSharding(self._mesh, spec))
            for index, (leaf, (_, _, spec)) in enumerate(zip(jax.tree.leaves(state), self._parameters, strict=True))
        )


def _random(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, where: NamedSharding) -> jax.Array:
    return _maker(shape, dtype, where)(key)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: np.dtype, where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    # Vectors are norms and biases: small ones keep the activations in range.
    scale = 0.02 if len(shape) > 1 else 1.0
    return jax.jit(lambda k: (scale * jax.random.normal(k, shape, jnp.float32)).astype(dtype), out_shardings=where)
