"""What operators see of a real engine with a tiny model."""

import asyncio
from pathlib import Path

import pytest

from nitsum_jax.control.tiers import DEFAULT_TIERS
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.request import FinishReason, Request
from nitsum_jax.runtime.callers import Caller, calling
from nitsum_jax.runtime.startup.scheduled_engine import start_scheduled
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.operations.monitor import Operations
from tests.engine.harness import tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.server.harness import until
from tests.server.operations.test_metrics import of

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_times_loads_and_switches_of_a_real_engine(tmp_path: Path) -> None:
    async def scenario() -> None:
        router = StreamRouter(asyncio.get_running_loop())
        config = EngineConfig(
            devices=2,
            layout="tp1x2",
            layouts=("tp1x2", "tp2"),
            max_batch=1,
            deterministic=True,
            max_model_len=512,
            kv_cache_gib=0.01,
            dtype="float32",
            tier_names=DEFAULT_TIERS.names,
        )
        model = tiny_model("llama_odd", tmp_path)
        started = await asyncio.to_thread(
            lambda: start_scheduled(model, config, DEFAULT_TIERS, router.sink, admitted=router.admitted)
        )
        engine = started.engine
        try:
            operations = Operations(engine, "tiny", DEFAULT_TIERS, router)
            idle = operations.snapshot()
            assert [(i.devices, i.tp, i.role, i.running, i.kv_use) for i in idle.instances] == [
                ((device,), 1, "mixed", 0, 0.0) for device in range(2)
            ]
            request = Request("r", (5, 6, 7), 150, tier="interactive")
            with router.stream(operations.front, request) as stream:
                await until(lambda: stream.record.tokens > 20, 120)
                busy = operations.snapshot()
                assert sum(instance.running for instance in busy.instances) == 1
                assert 0 < max(instance.kv_use for instance in busy.instances) < 1
                (mine,) = [tier for tier in busy.tiers if tier.name == "interactive"]
                assert (mine.running, mine.waiting) == (1, 0)
                with calling(Caller(admin=True)):
                    future = operations.front.set_layout("tp2")
                report = await asyncio.wrap_future(future)
                await until(lambda: stream.finished, 120)
            assert stream.record.finish is FinishReason.LENGTH
            await until(lambda: len(operations.layout_log.switches()) == 1)
            note = operations.layout_log.switches()[0]
            assert (note.from_layout, note.to_layout, note.kv_bytes) == ("tp1x2", "tp2", report.kv_bytes_moved)
            seen = of(operations.registry)
            assert seen["nitsum_generation_tokens_total", "interactive"] == 150
            assert seen["nitsum_request_queue_time_seconds_count", "interactive"] == 1
            assert seen["nitsum_request_queue_time_seconds_sum", "interactive"] >= 0
            assert seen["nitsum_request_prefill_time_seconds_sum", "interactive"] > 0
            assert seen["nitsum_bytes_moved_total", "kv"] == report.kv_bytes_moved
            assert seen["nitsum_switch_stall_seconds_sum",] == pytest.approx(report.stall_ms / 1e3)
            assert seen["nitsum_compiles_total",] > 0
            assert seen["nitsum_num_preemptions_total",] == 0
            assert seen["nitsum_prefix_cache_queries_total",] >= seen["nitsum_prefix_cache_hits_total",] == 0
            assert [(i.devices, i.tp) for i in operations.snapshot().instances] == [((0, 1), 2)]
        finally:
            await asyncio.to_thread(engine.close)

    asyncio.run(scenario())
