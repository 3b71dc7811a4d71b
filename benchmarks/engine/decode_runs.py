"""The engine and the bare executable, generating the same tokens from the same contexts.

The decode phase of the engine begins when all sequences have their first token and ends when each has got so many more.
Sequences that were prefilled first are ahead by then, and go on until the end, so the batch is full all the time.  The
bare run gets every sequence with the tokens it had at that moment, and runs the same compiled step as often.
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import Engine, start_engine
from nitsum_jax.engine.request import Request, SamplingParams, TokenDelta
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.program import StepState
from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.loading import OpenModel


@dataclasses.dataclass(frozen=True)
class EngineRun:
    """What the engine did with one batch.

    Attributes:
      decode_s: length of the decode phase.
      decode_tokens: tokens of all sequences in it.
      total_s: from the first `submit` to the end.
      total_tokens: tokens of all sequences in that time.
      leads: per sequence, how many tokens it had when the decode phase began.
      outputs: per sequence, its tokens to the end of the decode phase.
    """

    decode_s: float
    decode_tokens: int
    total_s: float
    total_tokens: int
    leads: tuple[int, ...]
    outputs: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class BareRun:
    """What the bare executable did.

    Attributes:
      decode_s: from the first dispatch until the tokens of all steps were read back.
      decode_tokens: tokens of all sequences.
      same_tokens: share of them that the engine chose too; below 1 only after a near tie.
    """

    decode_s: float
    decode_tokens: int
    same_tokens: float


class _Watch:
    """Takes the deltas of one batch and notes when its decode phase begins and ends."""

    def __init__(self, ids: Sequence[str], tokens: int):
        self.outputs: dict[str, list[int]] = {name: [] for name in ids}
        self.leads: dict[str, int] = {}
        self.start_s = 0.0
        self.end_s = 0.0
        self.error: str | None = None
        self.done = threading.Event()
        self._tokens = tokens

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        if self.done.is_set():
            return
        for delta in deltas:
            self.outputs[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.error = delta.error or f"a request ended too early: {delta.finish_reason}"
                self.done.set()
                return
        if not self.leads:
            if all(self.outputs.values()):
                self.leads = {name: len(output) for name, output in self.outputs.items()}
                self.start_s = deltas[-1].time_s
        elif all(len(output) >= self.leads[name] + self._tokens for name, output in self.outputs.items()):
            self.end_s = deltas[-1].time_s
            self.done.set()


class EngineRunner:
    """A running engine with one instance on one device."""

    def __init__(self, model: OpenModel, config: EngineConfig):
        self._watch: _Watch | None = None
        self._count = 0
        self.engine: Engine = start_engine(model, config, self._sink)
        self.engine.wait_for_layouts()

    def _sink(self, deltas: Sequence[TokenDelta]) -> None:
        if self._watch is not None:
            self._watch.take(deltas)

    def run(self, prompts: Sequence[Sequence[int]], tokens: int) -> EngineRun:
        """Continues all prompts, greedily, by `tokens` tokens each after all of them have begun.

        Raises:
          RuntimeError: the engine ended a request.
        """
        self._count += 1
        ids = [f"{self._count}-{index}" for index in range(len(prompts))]
        watch = self._watch = _Watch(ids, tokens)
        most = tokens + lead_limit(prompts)
        start = time.monotonic()
        for name, prompt in zip(ids, prompts, strict=True):
            self.engine.submit(Request(name, tuple(prompt), most))
        watch.done.wait()
        self._watch = None
        for name in ids:
            self.engine.cancel(name)
        while self.engine.stats().running:
            time.sleep(0.002)
        if watch.error is not None:
            raise RuntimeError(watch.error)
        outputs = [watch.outputs[name] for name in ids]
        leads = [watch.leads[name] for name in ids]
        return EngineRun(
            decode_s=watch.end_s - watch.start_s,
            decode_tokens=sum(map(len, outputs)) - sum(leads),
            total_s=watch.end_s - start,
            total_tokens=sum(map(len, outputs)),
            leads=tuple(leads),
            outputs=tuple(map(tuple, outputs)),
        )


def lead_limit(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that the first sequence may have got, and some, when the last has its first one."""
    # Prefill and decode steps take turns; a prefill step takes at least 2 tokens of a prompt, and mostly all.  And on
    # a busy machine the first one decodes while the last is still to be submitted.
    return 64 + sum(1 + len(prompt) // 16 for prompt in prompts)


class BareRunner:
    """The engine's own executables and weights, with a pool and a history of their own and nothing around them."""

    def __init__(self, runner: EngineRunner):
        cell = runner.engine._cell
        spec = cell.first.instances[0]
        self._program = cell.program
        self._executables = cell.executables.of(cell.group(spec))
        self._leaves = cell.leaves(spec)
        mesh = cell.geometries.of(spec.devices).mesh
        shape = (cell.program.pool.blocks * spec.tp, *cell.program.pool.block_shape)
        along = NamedSharding(mesh, PartitionSpec(TP_AXIS))
        self._pool = jnp.zeros(shape, cell.program.pool.storage_dtype, device=along)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._names = [name for name, _, _ in cell.program.parameters(spec.tp)]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads; of an untied embedding that is no more than a few rows."""
        untied = not self._program.config.tied_head
        return sum(
            leaf.nbytes
            for name, leaf in zip(self._names, self._leaves, strict=True)
            if not (untied and name.startswith("embed."))
        )

    def run(self, prompts: Sequence[Sequence[int]], engine: EngineRun, tokens: int) -> BareRun:
        """Runs the decode phase of an engine's run again."""
        known = [
            (*prompt, *output[: lead - 1])
            for prompt, output, lead in zip(prompts, engine.outputs, engine.leads, strict=True)
        ]
        tables = self._tables([len(sequence) + tokens for sequence in known])
        history = jax.device_put(np.zeros(self._program.history_shape, np.int32), self._everywhere)
        state = StepState(self._pool, history)
        for row, sequence in enumerate(known):
            state = self._prefill(row, sequence, tables[row], state)
        shape = min(s for s in self._executables if s.is_decode and s.batch >= len(prompts))
        executable = self._executables[shape]
        inputs = list(self._decode_inputs(shape, list(map(len, known)), tables, tokens))
        masks = jax.device_put(self._program.no_masks(shape), self._everywhere)
        jax.block_until_ready(state.history)

        start = time.perf_counter()
        results = []
        for packed in inputs:
            state, outcome = executable(self._leaves, state, packed, masks)
            results.append(outcome.tokens)
        read = [np.asarray(sampled) for sampled in results]
        seconds = time.perf_counter() - start
        self._pool = state.pool

        mine = np.stack(read, axis=1)[: len(prompts)]
        theirs = np.array([o[lead : lead + tokens] for o, lead in zip(engine.outputs, engine.leads, strict=True)])
        return BareRun(seconds, mine.size, float(np.mean(mine == theirs)))

    def _tables(self, lengths: Sequence[int]) -> list[np.ndarray]:
        """Block tables `i32[K, pages]`, no block twice."""
        vshards, tables, used = self._program.cut.num_vshards, [], 0
        for length in lengths:
            pages = -(-length // self._program.pool.page_size)
            tables.append(np.arange(used, used + vshards * pages, dtype=np.int32).reshape(vshards, pages))
            used += vshards * pages
        if used > self._program.pool.blocks:
            raise RuntimeError(f"{used} KV blocks needed, {self._program.pool.blocks} there: raise --kv_cache_gib")
        return tables

    def _packer(self, shape: StepShape) -> Packer:
        return Packer(shape, self._program.cut.num_vshards, self._program.pages, self._program.max_batch)

    def _prefill(self, row: int, sequence: Sequence[int], page_table: np.ndarray, state: StepState) -> StepState:
        buckets = sorted(shape for shape in self._executables if not shape.is_decode)
        done = 0
        while done < len(sequence):
            left = len(sequence) - done
            shape = next((shape for shape in buckets if shape.tokens >= left), buckets[-1])
            part = list(sequence[done : done + shape.tokens])
            packer = self._packer(shape)
            packer.add(
                sampling_columns(SamplingParams(), 0, len(sequence)),
                row=row,
                context=done,
                tokens=part,
                emit=len(part) == left,
                page_table=page_table,
            )
            state, _ = self._executables[shape](self._leaves, state, packer.done(), self._program.no_masks(shape))
            done += len(part)
        return state

    def _decode_inputs(
        self, shape: StepShape, lengths: Sequence[int], tables: Sequence[np.ndarray], tokens: int
    ) -> Iterator[np.ndarray]:
        columns = [sampling_columns(SamplingParams(), 0, length) for length in lengths]
        for step in range(tokens):
            packer = self._packer(shape)
            for row, length in enumerate(lengths):
                context = length + step
                packer.add(columns[row], row=row, context=context, tokens=None, emit=True, page_table=tables[row])
            yield packer.done()


@contextlib.contextmanager
def running(model: OpenModel, config: EngineConfig) -> Iterator[EngineRunner]:
    """An engine that is closed at the end."""
    runner = EngineRunner(model, config)
    try:
        yield runner
    finally:
        runner.engine.close()
