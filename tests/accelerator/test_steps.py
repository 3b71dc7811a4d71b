"""What the compilers of TPUs and GPUs make of a step: nothing large is copied, and nothing is read twice."""

import itertools
from collections.abc import Iterator

import pytest

from nitsum_jax.bench.compile.rows import exchanged_bytes, layer_kv_bytes, reading, work_of
from nitsum_jax.bench.compile.steps import CompiledStep
from nitsum_jax.engine.kv.memory import workspace_bytes
from nitsum_jax.engine.step.forms import AttentionForm
from tests.accelerator.cases import DECODE, MIXED, PREFILL, SINGLE, Asked, compiled, skip_without_compiler

CONTEXT = 512
ASKED = [
    *(Asked(*one) for one in itertools.product(("v5e:2x4", "v6e:2x4", "h100x8"), (1, 2, 4, 8), (DECODE, PREFILL))),
    *(Asked(*one) for one in itertools.product(("v5e:2x4", "v6e:2x4", "h100x8"), (1, 8), (MIXED,))),
    *(Asked(target, 1, SINGLE) for target in ("v5e:2x4", "h100x8")),
    Asked("v5e:2x4", 2, DECODE, dtype="float32"),
    Asked("h100x8", 2, DECODE, dtype="float32"),
    Asked("v5e:2x4", 1, DECODE, attention="xla"),
    Asked("v5e:2x4", 8, DECODE, fast_sums=True),
    Asked("h100x8", 8, DECODE, fast_sums=True),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(asked, id=str(asked), marks=pytest.mark.xdist_group(str(asked))) for asked in ASKED],
)
def step(request: pytest.FixtureRequest) -> Iterator[CompiledStep]:
    skip_without_compiler(request.param.target)
    yield compiled(request.param)
    compiled.cache_clear()


def test_the_pool_is_updated_in_place(step: CompiledStep) -> None:
    assert step.alias_bytes >= step.case.pool_bytes


def test_nothing_as_large_as_the_pool_is_written(step: CompiledStep) -> None:
    assert list(reading(step, CONTEXT).large_writes(step.case.pool_bytes)) == []


def test_no_weight_is_copied_transposed_or_joined_to_others(step: CompiledStep) -> None:
    weights = step.case.weight_numbers
    assert len(weights) == len(step.case.weight_sizes)
    assert list(reading(step, CONTEXT).copies_of(weights)) == []


def test_every_weight_is_read_once(step: CompiledStep) -> None:
    config, read = step.case.config, reading(step, 0).read_of(step.case.weight_numbers)
    itemsize = 2 if step.case.dtype == "bfloat16" else 4
    table = config.vocab_size // step.case.tp * config.d_model * itemsize
    weights = sum(step.case.weight_sizes) - table
    assert weights <= read <= weights + 2 * table  # of the embedding, which is small here, some rows or all are read


def test_devices_exchange_partial_results_and_little_else(step: CompiledStep) -> None:
    received = work_of(step, CONTEXT).received
    expected = exchanged_bytes(step.case, fast=step.case.fast_sums)
    # A compiler may choose to add up in float32 what is rounded to bfloat16 afterwards.
    most = 2.0 if step.case.fast_sums else 1.05
    assert expected <= received <= most * expected + 10_000


def test_temporary_memory_is_within_the_plan(step: CompiledStep) -> None:
    case = step.case
    platform, shape = case.target.chip.platform, case.shape
    batch, fused = shape.beside or shape.batch, shape.is_mixed
    assert step.temp_bytes <= workspace_bytes(case.config, case.program.cut, batch, shape.tokens, platform, fused=fused)


def test_attention_reads_each_old_key_and_value_once(step: CompiledStep) -> None:
    before, after = work_of(step, 0), work_of(step, CONTEXT)
    layers, once = step.case.config.num_layers, layer_kv_bytes(step.case, CONTEXT)
    read, written = after.read - before.read, after.written - before.written
    if step.case.program.forms.attention is AttentionForm.XLA:
        assert layers * once <= read <= 1.05 * layers * once
        assert written <= 0.05 * layers * once
        chip = step.case.target.chip
        if chip.clock_hz is not None:  # taking the numbers apart is no more work than reading them
            cycles = after.cycles - before.cycles
            assert cycles / chip.clock_hz <= 1.5 * read / chip.bytes_per_s
        return
    # What a kernel reads is by arithmetic, since the compiler does not know; no loop beside it may read or write.
    kernel = reading(step, CONTEXT)
    count = layers * len(step.case.shape.parts)
    assert len(list(kernel.kernels())) == count
    assert kernel.kernel_bytes == once or not step.case.shape.is_decode
    assert (read, written) == (count * kernel.kernel_bytes, 0)


def test_a_norm_is_a_handful_of_operations(step: CompiledStep) -> None:
    # Each takes a TPU about a microsecond, however little it does.  That counts in decode steps; the arrays of a chunk
    # of a prompt are larger, and XLA takes eight operations for them.  Sums of a single row are scalars, for which it
    # takes 23: see docs/accelerators.md.
    shape = step.case.shape
    if step.case.target.chip.platform != "tpu" or not shape.is_decode or shape.batch == 1:
        return
    norms = 2 * step.case.config.num_layers + 1
    made = [one for one, _, _ in reading(step, CONTEXT).instructions() if "/jit(rms_norm)/" in one.attributes]
    assert norms <= len(made) <= 5 * norms
