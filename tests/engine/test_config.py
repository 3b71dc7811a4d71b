"""Settings of an engine: ranges, buckets, and where the memory goes."""

import pathlib
from typing import Any

import pytest

from nitsum_jax.engine.config import EngineConfig, resolve_dtype
from nitsum_jax.engine.kv.memory import MemoryPlan, plan_memory, workspace_bytes
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.models.cuts import ModelCut
from tests.engine.reference import tiny_config

GIB = 1 << 30


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float64", "dtype=float64 is not known: give one of auto, float32, bfloat16"),
        ("page_size", 0, "page_size=0"),
        ("page_size", 24, "page_size=24 must be a power of two from 1 to 128"),
        ("page_size", 256, "page_size=256"),
        ("devices", 0, "devices=0 must be at least 1"),
        ("vshards", -1, "vshards=-1"),
        ("max_model_len", 0, "max_model_len=0"),
        ("max_batch", 0, "max_batch=0"),
        ("prefill_chunk", 0, "prefill_chunk=0"),
        ("prefill_chunk", 1, "prefill_chunk=1 must be at least 2"),
        ("max_queue", 0, "max_queue=0"),
        ("kv_cache_gib", 0.0, "kv_cache_gib=0.0 must be positive"),
        ("kv_cache_gib", -1.0, "kv_cache_gib=-1.0"),
        ("kv_cache_gib", float("nan"), "kv_cache_gib=nan"),
    ],
)
def test_values_out_of_range(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        EngineConfig(**{field: value})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_buckets() -> None:
    config = EngineConfig(max_batch=20, prefill_chunk=128)
    assert config.decode_shapes() == (StepShape(1, 1), StepShape(8, 1), StepShape(20, 1))
    assert config.prefill_shapes() == (StepShape(1, 32), StepShape(1, 128))
    assert EngineConfig(max_batch=8, prefill_chunk=32).decode_shapes() == (StepShape(1, 1), StepShape(8, 1))
    assert EngineConfig(max_batch=8, prefill_chunk=32).prefill_shapes() == (StepShape(1, 32),)


def test_deterministic_mode_has_one_bucket_per_phase() -> None:
    config = EngineConfig(max_batch=20, prefill_chunk=128, deterministic=True)
    assert config.decode_shapes() == (StepShape(20, 1),)
    assert config.prefill_shapes() == (StepShape(1, 128),)


def test_dtype_auto() -> None:
    assert resolve_dtype("float32", "gpu") == "float32"
    assert resolve_dtype("bfloat16", "cpu") == "bfloat16"
    assert resolve_dtype("auto", "gpu") == resolve_dtype("auto", "tpu") == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx2 avx512f", "float32"), ("avx512f avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), (None, "float32")],
)
def test_dtype_auto_on_a_cpu_depends_on_its_instructions(
    flags: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: pathlib.Path, *_: object, **__: object) -> str:
        assert str(path) == "/proc/cpuinfo"
        if flags is None:
            raise FileNotFoundError(path)
        return f"flags : {flags}\n"

    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert resolve_dtype("auto", "cpu") == expected


# ---- memory

CUT = ModelCut.of(tiny_config("llama_odd"), 4)


def plan(**changes: Any) -> MemoryPlan:
    arguments: dict[str, Any] = {
        "dtype": "float32",
        "platform": "gpu",
        "devices": 4,
        "weights": GIB,
        "allocated": 4 * GIB,
        "free": 8 * GIB,
        "max_batch": 8,
        "max_model_len": 256,
        "page_size": 16,
        "chunk": 32,
        "kv_cache_gib": None,
    }
    return plan_memory(CUT.config, CUT, **(arguments | changes))


def test_the_pool_holds_what_can_be_used_and_no_more() -> None:
    memory = plan()
    assert memory.tokens == 8 * 256
    assert memory.pool.blocks == memory.tokens // 16 * CUT.num_vshards
    assert memory.pool.kv_heads == CUT.kv_heads
    assert memory.workspace == workspace_bytes(CUT.config, CUT, 8, 32, "gpu")
    # A CPU samples few rows at a time and has no libraries that want memory.
    assert 0 < plan(platform="cpu", allocated=0).workspace < memory.workspace


def test_the_workspace_of_a_gpu_has_room_for_the_parts_of_a_decode_step() -> None:
    # 16 parts of at least 16 rows of float32 for each KV head of each sequence.
    parts = 4 * 4096 * CUT.num_vshards * CUT.kv_heads * 16 * 16 * CUT.config.head_dim
    logits = 8 * 4 * 4096 * CUT.vocab * CUT.num_vshards
    assert workspace_bytes(CUT.config, CUT, 4096, 32, "gpu") >= parts + logits
    assert workspace_bytes(CUT.config, CUT, 4096, 32, "cpu") < parts


def test_the_pool_fits_beside_weights_and_workspace() -> None:
    memory = plan(max_batch=64, max_model_len=1 << 20)
    size = memory.pool.blocks * memory.pool.block_bytes
    assert size + memory.weights + memory.workspace <= 8 * GIB
    assert size > 0.8 * (7 * GIB - memory.workspace)


def test_a_cache_in_8_bits_holds_nearly_twice_the_context_in_the_same_memory() -> None:
    wide, narrow = (plan(dtype=dtype, kv_cache_gib=1.0, max_model_len=1 << 20) for dtype in ("bfloat16", "int8"))
    width = CUT.config.head_dim
    assert narrow.tokens / wide.tokens == pytest.approx(2 * width / (width + 2), rel=0.01)
    assert "int8" in narrow.text


def test_devices_of_a_cpu_share_one_memory() -> None:
    memory = plan(platform="cpu", allocated=GIB, max_batch=64, max_model_len=1 << 20, free=4 * GIB)
    assert 4 * (memory.pool.blocks * memory.pool.block_bytes + memory.workspace) + GIB < 4 * GIB


def test_the_size_asked_for_is_the_size_given() -> None:
    memory = plan(kv_cache_gib=0.5)
    assert 0.499 * GIB < memory.pool.blocks * memory.pool.block_bytes <= 0.5 * GIB
    assert plan(kv_cache_gib=0.5, free=None).pool == memory.pool  # nobody knows what is free: the user is believed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_gib": 9.0}, "lower --kv_cache_gib"),
        ({"kv_cache_gib": 1e-6}, "raise --kv_cache_gib"),
        ({"free": GIB}, "use more devices, a smaller model"),
        ({"platform": "cpu", "free": 3 * GIB}, "use more devices, a smaller model"),
    ],
)
def test_what_does_not_fit_names_the_flag_to_change(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PreconditionError) as caught:
        plan(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_is_told() -> None:
    text = plan().text
    for part in ("weights 1.00 GiB", "KV cache", "workspace", "free before: 8.00 GiB", "2048 tokens", "query heads 9"):
        assert part in text, text
