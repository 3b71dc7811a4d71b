"""One step: the right numbers, the same bits at every degree of tensor parallelism, the pool updated in place."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program, compile_step
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.meshes.mesh import instance_mesh
from nitsum_jax.meshes.vshards import VshardMap
from nitsum_jax.models import tiny_random
from nitsum_jax.models.cuts import ModelCut
from nitsum_jax.models.loading import open_model
from tests.engine.quick import compiling_quickly, without_draws
from tests.engine.reference import decoder_logits, tiny_params
from tests.engine.rig import Outcome, Row, StepRig
from tests.models.golden import tiny_models

# Lengths on both sides of a page (16) and of a chunk of the attention (128), and two chunks.
CONTEXTS = (0, 127, 128, 129, 15, 16, 300, 255, 256, 1, 64, 200, 17, 130, 5, 99)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.1, seed=7, logit_bias=((3, 2.5), (8, -100)))


def decode_rows(count: int, vocab: int, draws: bool) -> list[Row]:
    """Decode rows; every third one samples if there are draws."""
    return [
        Row(
            context,
            ((7 * index + 3) % vocab,),
            SAMPLED if draws and index % 3 == 2 else SamplingParams(),
            stops=(5, 9) if draws and index % 4 == 3 else (),
            logprobs=draws and index % 2 == 0,
        )
        for index, context in enumerate(CONTEXTS[:count])
    ]


def prefill_rows(length: int, context: int, vocab: int, draws: bool) -> list[Row]:
    return [Row(context, tuple((11 * i + 5) % vocab for i in range(length)), logprobs=draws)]


def assert_same_bits(actual: Outcome, expected: Outcome, what: str) -> None:
    for field in dataclasses.fields(Outcome):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        # As integers: -0.0 is not 0.0 here, and NaN would be itself.
        kind = f"u{a.dtype.itemsize}"
        assert np.array_equal(a.view(kind), b.view(kind)), f"{field.name} differs {what}"


@dataclasses.dataclass(frozen=True)
class Steps:
    """One bucket: its rows or tokens, how many of them are in use, and the degrees of parallelism that are compared."""

    bucket: int
    used: int
    tps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Promise:
    """Steps of a variant, with what draws tokens and tells log probabilities or up to the logits that it is given."""

    variant: str
    dtype: str
    decodes: tuple[Steps, ...]
    prefills: tuple[Steps, ...] = ()
    draws: bool = False
    kv_dtype: str | None = None


ALL = (1, 2, 4, 8)
# Compiling as users do takes most of the time here, so not every bucket is compiled at every degree in both types, but
# every pair is there: type and degree, type and kind of step, degree and kind of step (one row, several, a prompt).
# Draws see nothing of a layout and a type but float32 logits, the same on all ranks, so one variant has them.
PROMISES = [
    # SmolLM2's head counts: padded groups, heads, MLP and vocabulary.
    Promise("llama_odd", "float32", (Steps(1, 1, (1, 8)), Steps(8, 5, ALL)), (Steps(32, 20, (2, 4)),), draws=True),
    Promise("llama_gqa_tied", "bfloat16", (Steps(1, 1, (2, 4)), Steps(16, 16, (1, 8))), (Steps(32, 32, ALL),)),
    Promise("qwen3", "bfloat16", (Steps(4, 3, (1, 8)),)),
    Promise("qwen2_mha", "float32", (Steps(16, 11, (2, 8)),)),
    Promise("llama_odd", "bfloat16", (Steps(8, 5, (1, 8)),), (Steps(32, 20, (2, 4)),), kv_dtype="int8"),
]


@functools.cache
def promised(variant: str, dtype: str, kv_dtype: str | None = None) -> StepRig:
    """Compiled as users compile it, once for all tests here."""
    return StepRig(variant, dtype, kv_dtype=kv_dtype)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: f"{p.variant}-{p.dtype}-{p.kv_dtype or 'same'}")
def test_every_degree_of_parallelism_gives_the_same_bits(promise: Promise) -> None:
    rig, draws = promised(promise.variant, promise.dtype, promise.kv_dtype), promise.draws
    vocab = rig.cut.config.vocab_size
    cases = [(StepShape(one.bucket, 1), decode_rows(one.used, vocab, draws), one.tps) for one in promise.decodes]
    for context in (0, 100, 250):
        cases += [
            (StepShape(1, one.bucket), prefill_rows(one.used, context, vocab, draws), one.tps)
            for one in promise.prefills
        ]
    with contextlib.nullcontext() if draws else without_draws():
        rig.compile_all((shape, tp) for shape, _, tps in cases for tp in tps)
    for shape, rows, (first, *others) in cases:
        expected = rig.run(rows, shape, first)
        finite = expected.logits[: len(rows), :vocab]
        assert np.isfinite(finite).all()
        assert finite.std() > 1  # there is something to differ
        for tp in others:
            assert_same_bits(rig.run(rows, shape, tp), expected, f"at TP {tp} and {shape} from TP {first}")


@pytest.fixture(scope="module")
def rig() -> StepRig:
    return promised("llama_odd", "float32")


@pytest.mark.parametrize("tp", [1, 4])
def test_prefill_in_chunks_and_decode_give_the_logits_of_the_whole_sequence(tp: int) -> None:
    rig = StepRig("qwen2_tied", "float32", vshards=4, batch=4, max_model_len=128)
    with compiling_quickly():  # it rounds differently, and here all is asked up to rounding
        rig.compile_all((shape, tp) for shape in (StepShape(1, 16), StepShape(4, 1)))
    cut, params = tiny_params("qwen2_tied", 1)
    tokens = tiny_models.token_ids("qwen2_tied")[0]
    expected = decoder_logits(cut, params, tokens[None])[0]
    vocab, prefill, decode = rig.cut.config.vocab_size, StepShape(1, 16), StepShape(4, 1)
    blocks = np.zeros_like(rig.past)
    done = 0
    for count in (16, 5):  # a full chunk, and one with padding
        row = Row(done, tuple(tokens[done : done + count].tolist()))
        outcome = rig.run([row], prefill, tp, blocks)
        blocks, done = outcome.blocks, done + count
        np.testing.assert_allclose(outcome.logits[0, :vocab], expected[done - 1], rtol=0, atol=1e-4)
        assert outcome.sampled[0] == expected[done - 1].argmax()
    for position in range(done, len(tokens)):
        outcome = rig.run([Row(position, (int(tokens[position]),))], decode, tp, blocks)
        blocks = outcome.blocks
        np.testing.assert_allclose(outcome.logits[0, :vocab], expected[position], rtol=0, atol=1e-4)
        assert outcome.history[0, position + 1] == expected[position].argmax()


def test_rows_of_a_batch_do_not_touch_each_other(rig: StepRig) -> None:
    shape = StepShape(8, 1)
    rows = [Row(context, (token,)) for context, token in ((3, 9), (40, 8), (17, 7))]
    together = rig.run(rows, shape, 1)
    changed = rig.run([Row(90, (1,)), rows[1], Row(5, (2,), SAMPLED)], shape, 1)
    np.testing.assert_array_equal(changed.logits[1], together.logits[1])
    own = rig.page_table[1].reshape(-1)
    np.testing.assert_array_equal(changed.blocks[own], together.blocks[own])
    # One token was written to the one page of every vshard that is due, and to no other block at all.
    written = np.flatnonzero((together.blocks != rig.past).any(axis=(1, 2, 3, 4, 5)))
    due = [rig.page_table[row, :, context // 16] for row, context in enumerate((3, 40, 17))]
    assert set(written) == set(np.concatenate(due))


def test_padding_rows_leave_history_and_pool_alone(rig: StepRig) -> None:
    outcome = rig.run([], StepShape(8, 1), 1)
    np.testing.assert_array_equal(outcome.blocks, rig.past)
    np.testing.assert_array_equal(outcome.history[:-1], 0)  # the last row is their own


def planned_memory(program: Program, shape: StepShape, mesh: Mesh) -> Any:
    """What XLA says of the buffers of a step; it has planned them before it makes machine code, which is left plain."""
    lower = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        options = {"xla_backend_optimization_level": "0"}
        patch.setattr(jax.stages.Lowered, "compile", lambda self, given=None: lower(self, {**(given or {}), **options}))
        memory = compile_step(program, shape, mesh).memory_analysis()
    assert memory is not None
    return memory


@pytest.mark.parametrize(
    ("dtype", "tp", "shape"),
    [
        ("float32", 1, StepShape(2, 1)),
        ("float32", 2, StepShape(1, 16)),
        ("bfloat16", 1, StepShape(1, 16)),
        ("bfloat16", 2, StepShape(2, 1)),
    ],
)
def test_the_pool_is_updated_in_place(dtype: str, tp: int, shape: StepShape) -> None:
    small = StepRig("llama_gqa_tied", dtype, vshards=2, batch=2, max_model_len=128)
    pool = dataclasses.replace(small.program.pool, blocks=50_000)
    pool_bytes = pool.blocks * pool.block_bytes
    assert pool_bytes > 20e6
    program = dataclasses.replace(small.program, pool=pool)
    memory = planned_memory(program, shape, small.mesh(tp))
    assert memory.alias_size_in_bytes >= pool_bytes  # donated, and the result lies where the argument did
    assert memory.temp_size_in_bytes < pool_bytes // 10  # and no copy in between


def test_the_pool_is_not_copied_where_a_virtual_shard_has_one_narrow_head(tmp_path: pathlib.Path) -> None:
    tiny_random.write(tmp_path)
    config = open_model(str(tmp_path)).config
    cut = ModelCut.of(config, 8)
    pool = PoolShape(20_000, config.num_layers, 16, cut.kv_heads, config.head_dim, "float32")
    program = Program(config, cut, "float32", pool, 8, 512)
    mesh = instance_mesh(jax.local_devices(), InstanceSpec((0,)), VshardMap(8))
    memory = planned_memory(program, StepShape(8, 1), mesh)
    assert memory.temp_size_in_bytes < pool.blocks * pool.block_bytes // 10
