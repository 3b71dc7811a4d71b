"""The memory plan of a cell and the compiler of its devices agree on what fits."""

import dataclasses

import jax
import pytest

from nitsum_jax.bench.compile.steps import StepCase, compile_case
from nitsum_jax.engine.kv.memory import MemoryPlan, plan_memory
from nitsum_jax.errors import PreconditionError
from tests.accelerator.cases import DECODE, Asked, skip_without_compiler

_GIB = 1 << 30


def plan(case: StepCase, kv_cache_gib: float | None) -> MemoryPlan:
    """The plan of a cell whose devices keep what the step at its TP works with."""
    weights = sum(case.weight_sizes)
    return plan_memory(
        case.config,
        case.program.cut,
        dtype=case.dtype,
        platform=case.target.chip.platform,
        devices=case.tp,
        weights=weights,
        allocated=weights * case.tp,
        free=case.target.chip.memory_bytes,
        max_batch=case.shape.batch,
        max_model_len=case.max_model_len,
        page_size=case.page_size,
        chunk=case.shape.tokens,
        kv_cache_gib=kv_cache_gib,
    )


def with_pool(case: StepCase, size: int) -> StepCase:
    """The step with a pool of so many bytes on each device."""
    blocks = size // case.program.pool.block_bytes
    return dataclasses.replace(case, pool_tokens=blocks * case.page_size * case.tp // case.vshards)


@pytest.mark.parametrize("target", ["v5e:2x4", "v6e:2x4"])
def test_a_pool_that_the_plan_allows_compiles_and_one_that_it_refuses_does_not(target: str) -> None:
    skip_without_compiler(target)
    case = Asked(target, 8, DECODE).case
    left = case.target.chip.memory_bytes - sum(case.weight_sizes) - plan(case, None).workspace
    most = 0.999 * left / _GIB
    allowed = with_pool(case, plan(case, most).pool.blocks * case.program.pool.block_bytes)
    assert allowed.pool_bytes == pytest.approx(left, rel=0.01)
    assert compile_case(allowed).alias_bytes >= allowed.pool_bytes
    with pytest.raises(PreconditionError, match="does not fit"):
        plan(case, 1.01 * case.target.chip.memory_bytes / _GIB)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        compile_case(with_pool(case, int(1.01 * case.target.chip.memory_bytes)))
