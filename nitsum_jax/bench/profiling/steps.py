"""Times of an instance's own executables, run again and again on a cell whose engine is closed."""

import statistics
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.cell import Cell
from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.program import StepState
from nitsum_jax.meshes.layout import InstanceSpec

_ROUND_S = 0.1
_MOST_STEPS = 50


class StepTimer:
    """Steps of one instance, on the first devices of a cell, whose pools are not on loan."""

    def __init__(self, cell: Cell, tp: int, rounds: int):
        """Takes the executables that the engine has compiled.

        Args:
          cell: an engine's, which was closed.
          tp: TP of the instance.
          rounds: how often each step is timed; the median counts.
        """
        self._cell = cell
        self._rounds = rounds
        self._spec = InstanceSpec(tuple(range(tp)))
        self._group = cell.group(self._spec)
        self._mesh = cell.geometries.of(self._spec.devices).mesh
        self._leaves = cell.leaves(self._spec)
        self._executables = cell.executables.of(self._group)
        self._slots = cell.vmap.slots(tp)

    @property
    def shapes(self) -> list[StepShape]:
        """Buckets there are, smallest first."""
        return sorted(self._executables)

    def fits(self, shape: StepShape, context: int) -> bool:
        """Whether length and cache allow so much context before each row of a step."""
        program = self._cell.program
        pages = -(-(context + shape.tokens) // program.pool.page_size)
        blocks = shape.rows * self._slots * pages
        return context + shape.tokens <= program.max_model_len and blocks <= program.pool.blocks

    def seconds(self, shape: StepShape, context: int) -> float:
        """Time of a step with all its rows in use, after so much context of each.

        Median of several rounds; in a round the host dispatches a step while the one before runs, as an engine does.
        """
        compiled = self._executables[shape]
        packed = self._packed(shape, context)
        where = NamedSharding(self._mesh, PartitionSpec())
        history = jax.device_put(np.zeros(self._cell.program.history_shape, np.int32), where)
        masks = jax.device_put(self._cell.program.no_masks(shape), where)
        state = StepState(self._cell.pool.lend(self._mesh, self._group), history)

        def run(steps: int) -> float:
            nonlocal state
            start = time.perf_counter()
            before: jax.Array | None = None
            for _ in range(steps):
                state, results = compiled(self._leaves, state, packed, masks)
                if before is not None:  # as in an engine, two are in flight; with many, emulated devices deadlock
                    jax.block_until_ready(before)
                before = results.tokens
            jax.block_until_ready(results.tokens)
            return (time.perf_counter() - start) / steps

        try:
            run(1)  # its first run may plan and allocate
            steps = min(max(2, round(_ROUND_S / run(1))), _MOST_STEPS)
            return statistics.median(run(steps) for _ in range(self._rounds))
        finally:
            self._cell.pool.take_back(state.pool, self._group)

    def _packed(self, shape: StepShape, context: int) -> np.ndarray:
        program, vshards = self._cell.program, self._cell.vmap.num_vshards
        packer = Packer(shape, vshards, program.pages, program.max_batch)
        pages = -(-(context + shape.tokens) // program.pool.page_size)
        columns = sampling_columns(SamplingParams(temperature=0.0), 0, context)
        for row in range(shape.rows):
            # Neighbouring vshards share a device; there every block is another one.
            slot = np.arange(vshards, dtype=np.int32) % self._slots
            first = (row * self._slots + slot) * pages
            page_table = first[:, None] + np.arange(pages, dtype=np.int32)
            tokens = None if shape.is_decode or row >= shape.batch else [1] * shape.tokens
            # A mixed step may have room for more sequences than an instance has.
            packer.add(
                columns,
                row=min(row, program.max_batch),
                context=context,
                tokens=tokens,
                emit=True,
                page_table=page_table,
            )
        return packer.done()
