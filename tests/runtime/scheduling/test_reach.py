"""Targets that a machine cannot keep are told at the start, and made longer where that is asked for."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.tiers import DEFAULT_TIERS, Tier, TierSet
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.request import TokenDelta
from nitsum_jax.runtime.scheduling.reach import Reach, Tap, predicted_reach, stretched, unkept
from nitsum_jax.runtime.startup.scheduled_engine import start_scheduled
from tests.control.cells import COST
from tests.engine.harness import tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401

SLOW = Reach(512, ttft_ms=640.0, tpot_ms=71.0)


def test_tiers_out_of_reach_are_named_with_what_there_is_instead() -> None:
    (line,) = unkept(DEFAULT_TIERS, SLOW)
    assert line.startswith("tier interactive cannot be kept here")
    assert "TTFT 640 ms instead of 500 and TPOT 71 ms instead of 50" in line
    assert "--tiers=auto" in line
    assert unkept(DEFAULT_TIERS, Reach(512, 20.0, 5.0)) == []
    (line,) = unkept(DEFAULT_TIERS, dataclasses.replace(SLOW, compiling=True))
    assert "while other executables are compiled" in line


def test_longer_targets_leave_room_and_those_that_can_be_kept_stay() -> None:
    tiers = stretched(DEFAULT_TIERS, SLOW)
    assert tiers.names == DEFAULT_TIERS.names
    assert [(tier.ttft_ms, tier.tpot_ms) for tier in tiers] == [(2000, 220), (2000, 220), (60_000, 1000)]


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e5))
def test_what_was_stretched_can_be_kept(ttft_ms: float, tpot_ms: float) -> None:
    reach = Reach(512, ttft_ms, tpot_ms)
    tiers = stretched(DEFAULT_TIERS, reach)
    assert unkept(tiers, reach) == []
    for tier, before in zip(tiers, DEFAULT_TIERS, strict=True):
        assert tier.ttft_ms >= before.ttft_ms
        assert tier.tpot_ms >= before.tpot_ms


def test_a_profile_says_it_without_a_measurement() -> None:
    reach = predicted_reach(COST, [1, 4])
    assert reach.ttft_ms == 1000 * COST.prefill_s(4, 512)
    assert reach.tpot_ms == 1000 * COST.step_s(4, 1, 512)


@pytest.mark.usefixtures("quick_compiles")
def test_a_server_measures_itself_and_nobody_else_notices(tmp_path: Path) -> None:
    seen: list[TokenDelta] = []
    admitted: list[str] = []

    def sink(deltas: Sequence[TokenDelta]) -> None:
        seen.extend(deltas)

    impossible = TierSet((Tier("fast", ttft_ms=0.001, tpot_ms=0.001), Tier("slow", ttft_ms=1e6, tpot_ms=1e6)))
    config = EngineConfig(devices=1, max_model_len=64, max_batch=2, tier_names=impossible.names, kv_cache_gib=0.01)
    started = start_scheduled(
        tiny_model("llama_odd", tmp_path),
        config,
        impossible,
        sink,
        admitted=lambda name, _: admitted.append(name),
        find_reach=True,
        stretch=True,
    )
    try:
        assert started.reach is not None
        assert started.reach.prompt_tokens < 64  # as many as there is room for
        assert unkept(impossible, started.reach)
        assert unkept(started.tiers, started.reach) == []
        assert started.tiers.get("slow") == impossible.get("slow")
        assert started.scheduling.scheduler.tiers == tuple(started.tiers)
        assert (seen, admitted) == ([], [])
        assert started.engine.stats().running == 0
        started.engine.set_layout("tp1/slow")  # nothing stops: the engine's thread tells the scheduling
        assert started.engine.ask(started.scheduling.plan).result(timeout=10).placed == "tp1@0/slow"
    finally:
        started.engine.close()


def test_all_others_pass_a_tap() -> None:
    seen: list[TokenDelta] = []
    tap = Tap(seen.extend)
    delta = TokenDelta("r1", (5,), 0.0)
    tap([delta])
    assert seen == [delta]
