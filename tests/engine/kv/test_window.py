"""Blocks behind the window of a model that has one in every layer are given back while its sequences go on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.engine.kv.kv_pool import BlockAllocator
from nitsum_jax.engine.kv.window import give_back
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from tests.engine.harness import Harness, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import generate, random_prompts

VARIANT, WINDOW, PAGE = "mistral_window", 8, 4


@given(steps=st.lists(st.integers(1, 20), min_size=1, max_size=12), window=st.integers(1, 40))
def test_what_is_seen_stays_and_all_comes_back(steps: list[int], window: int) -> None:
    allocators, pages = [BlockAllocator(80), BlockAllocator(80)], 70
    sequence = LiveRequest(Request("a", (1,), 1), 0, [1], np.zeros((2, pages), np.int32), 2)
    for tokens in steps:
        sequence.cached += tokens
        missing = -(-sequence.cached // PAGE) - sequence.pages
        for table, allocator in zip(sequence.page_table, allocators, strict=True):
            table[sequence.pages : sequence.pages + missing] = allocator.take(missing)
        sequence.pages += missing
        before = sequence.page_table[:, : sequence.pages].copy()
        give_back(sequence, window, PAGE, allocators, entered_only=False)
        seen = max(0, sequence.cached + 1 - window) // PAGE  # what the next token sees
        np.testing.assert_array_equal(sequence.page_table[:, seen : sequence.pages], before[:, seen:])
        held = sequence.pages - min(seen, sequence.pages - 1)
        for table, allocator in zip(sequence.page_table, allocators, strict=True):
            assert allocator.free == allocator.total - held
            assert np.unique(table[: sequence.pages]).size == held
            assert (allocator.users(table[: sequence.pages]) > 0).all()
    for table, allocator in zip(sequence.page_table, allocators, strict=True):
        allocator.give(table[: sequence.pages])
        assert allocator.free == allocator.total
        assert np.unique(allocator.take(80)).size == 80  # none of them twice


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize("shared", [False, True])
def test_a_long_answer_holds_no_more_than_its_window_also_across_a_switch(
    tmp_path_factory: pytest.TempPathFactory, shared: bool
) -> None:
    (prompt,) = random_prompts(1, (21, 21), 96, 5)
    (expected,), gap = generate(VARIANT, [prompt], 60)
    assert gap > 1e-3  # no other order of summation could choose otherwise
    settings = {"layouts": ("tp1x2", "tp2"), "layout": "tp1x2", "devices": 2, "prefix_cache": shared}
    model = tiny_model(VARIANT, tmp_path_factory.mktemp("model"))
    with Harness(model, page_size=PAGE, max_batch=1, max_model_len=128, prefill_chunk=16, **settings) as harness:
        harness.engine.wait_for_layouts()
        pool, held = harness.engine.cell.pool, []
        name = "long"
        for count in (5, 20, 28, 50):  # on the engine's thread, as soon as so many tokens have come
            harness.recorder.when(name, count, lambda: held.append(pool.total - pool.free))
        harness.submit(prompt, 60, name=name)
        harness.recorder.wait(lambda: harness.recorder.count(name) >= 24)
        harness.switch("tp2")
        (answer,) = harness.collect([name])
        assert answer.error is None
        assert list(answer.tokens) == expected
        # Two virtual shards; the window, the page that it begins in, and the tokens of two steps in flight.
        most = 2 * (math.ceil(WINDOW / PAGE) + 1 + 1)
        assert max(held) <= most < 2 * math.ceil(50 / PAGE)
        assert pool.free == pool.total
