"""One step of a model with random weights on one device, ready to be run again and again."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.engine.step.program import Program, StepState, compile_step
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import TP_AXIS, instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.models.cuts import ModelCut

PAGE_SIZE = 16
_WARM_UP, _STEPS, _ROUNDS = 3, 10, 3


class TimedModel:
    """A model on one device at TP 1, cut in K vshards that are separate buffers."""

    def __init__(
        self, config: ModelConfig, vshards: int, dtype: str, device: jax.Device, *, max_batch: int, max_len: int
    ):
        """Makes random weights on the device.

        Args:
          config: shapes.
          vshards: K.
          dtype: of weights and KV.
          device: where.
          max_batch: sequences.
          max_len: tokens of each.
        """
        cut = ModelCut.of(config, vshards)
        forms = step_forms(device.platform, dtype)
        one = PoolShape(1, config.num_layers, PAGE_SIZE, cut.kv_heads, config.head_dim, dtype, forms.pool)
        self._pages = one.pages(max_len)
        pool = dataclasses.replace(one, blocks=max_batch * vshards * self._pages)
        self.program = Program(
            config,
            cut,
            dtype,
            pool,
            max_batch,
            max_len,
            fitting(forms, "auto", pool, q_heads=cut.q_heads, most_new_tokens=max_len),
        )
        self._mesh = instance_mesh([device], InstanceSpec((0,)), VshardMap(vshards))
        _, state = self.program.decoder(1)
        parameters = self.program.parameters(1)
        key = jax.random.key(0)
        self.leaves = tuple(
            _random(jax.random.fold_in(key, index), leaf.shape, leaf.dtype, NamedSharding(self._mesh, spec))
            for index, (leaf, (_, _, spec)) in enumerate(zip(jax.tree.leaves(state), parameters, strict=True))
        )

    def replace_leaves(self, leaves: tuple[np.ndarray, ...]) -> None:
        """Takes other weights, in the same order."""
        specs = [spec for _, _, spec in self.program.parameters(1)]
        self.leaves = tuple(
            jax.device_put(leaf, NamedSharding(self._mesh, spec)) for leaf, spec in zip(leaves, specs, strict=True)
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """f32[V]: logits behind a prompt, i32[T], in one prefill step."""
        shape = StepShape(1, len(tokens))
        compiled = compile_step(self.program, shape, self._mesh, with_logits=True)
        _, results = compiled(self.leaves, self._state(), self._packed(shape, 0, tokens.tolist()), self._masks(shape))
        return np.asarray(results.logits)[0]

    def step_ms(self, shape: StepShape, context: int) -> float:
        """Milliseconds of a step behind `context` tokens: median of rounds of steps that the host does not wait for."""
        compiled = compile_step(self.program, shape, self._mesh)
        packed = self._packed(shape, context, None if shape.is_decode else [1] * shape.tokens)
        state, masks = self._state(), self._masks(shape)
        times = []
        for steps in (_WARM_UP, *[_STEPS] * _ROUNDS):
            start = time.perf_counter()
            for _ in range(steps):
                state, results = compiled(self.leaves, state, packed, masks)
            jax.block_until_ready(results.tokens)
            times.append((time.perf_counter() - start) / steps)
        return 1000 * statistics.median(times[1:])

    def _masks(self, shape: StepShape) -> jax.Array:
        return jax.device_put(self.program.no_masks(shape), NamedSharding(self._mesh, PartitionSpec()))

    def _state(self) -> StepState:
        shape = self.program.pool
        along, everywhere = (NamedSharding(self._mesh, spec) for spec in (PartitionSpec(TP_AXIS), PartitionSpec()))
        return StepState(
            pool=jnp.zeros((shape.blocks, *shape.block_shape), shape.storage_dtype, device=along),
            history=jnp.zeros(self.program.history_shape, jnp.int32, device=everywhere),
        )

    def _packed(self, shape: StepShape, context: int, tokens: list[int] | None) -> np.ndarray:
        vshards = self.program.cut.num_vshards
        packer = Packer(shape, vshards, self.program.pages, self.program.max_batch)
        used = -(-(context + shape.tokens) // PAGE_SIZE)
        columns = sampling_columns(SamplingParams(temperature=0.0), 0, context)
        for row in range(shape.batch):
            first = row * vshards * self._pages
            page_table = first + np.arange(vshards * self._pages, dtype=np.int32).reshape(vshards, self._pages)
            packer.add(columns, row=row, context=context, tokens=tokens, emit=True, page_table=page_table[:, :used])
        return packer.done()


def _random(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype, where: NamedSharding) -> jax.Array:
    return _maker(shape, dtype, where)(key)


@functools.cache
def _maker(shape: tuple[int, ...], dtype: np.dtype, where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    # Vectors are norms and biases: small ones keep the activations in range.
    scale = 0.02 if len(shape) > 1 else 1.0
    return jax.jit(lambda k: (scale * jax.random.normal(k, shape, jnp.float32)).astype(dtype), out_shardings=where)
