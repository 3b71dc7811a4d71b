"""A KV cache in 8 bits, as the compilers of TPUs and GPUs have it: still updated in place, and nothing of it copied."""

import pytest

from nitsum_jax.bench.compile.rows import reading
from tests.accelerator.cases import DECODE, PREFILL, Asked, compiled, skip_without_compiler

CONTEXT = 512
ASKED = [
    Asked("v5e:2x4", 8, DECODE, kv_dtype="float8_e4m3"),
    Asked("v6e:2x4", 1, PREFILL, kv_dtype="float8_e4m3"),
    Asked("h100x8", 8, DECODE, kv_dtype="float8_e4m3"),
    Asked("h100x8", 1, DECODE, kv_dtype="int8"),
    Asked("h100x8", 8, PREFILL, kv_dtype="int8"),
]


@pytest.mark.parametrize(
    "asked", [pytest.param(asked, id=str(asked), marks=pytest.mark.xdist_group(str(asked))) for asked in ASKED]
)
def test_the_pool_is_updated_in_place_and_never_copied(asked: Asked) -> None:
    skip_without_compiler(asked.target)
    step = compiled(asked)
    assert step.alias_bytes >= step.case.pool_bytes
    assert step.temp_bytes < step.case.pool_bytes
    assert list(reading(step, CONTEXT).large_writes(step.case.pool_bytes)) == []
    compiled.cache_clear()
