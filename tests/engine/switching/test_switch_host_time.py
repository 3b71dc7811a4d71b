"""What a switch costs the host when very many sequences live."""

import time
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.engine import loop
from nitsum_jax.engine.request import FinishReason
from tests.engine.harness import Harness, tiny_model
from tests.engine.quick import greedy_steps  # noqa: F401
from tests.engine.reference import random_prompts

pytestmark = pytest.mark.usefixtures("greedy_steps")

LIVE, ROUNDS = 256, 6
WALK = ("tp2x2", "tp4", "tp1x4")


def test_the_host_part_of_a_switch_of_256_sequences_is_no_matter_of_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time of the engine's thread.  It takes 5 to 9 ms; the bound is for busy machines."""
    spent: list[float] = []
    real = loop.perform_switch

    def timed(*args: Any) -> Any:
        start = time.thread_time()
        outcome = real(*args)
        spent.append(time.thread_time() - start)
        return outcome

    monkeypatch.setattr(loop, "perform_switch", timed)
    prompts = random_prompts(LIVE, (32, 32), 93, seed=9)
    settings = {
        "max_batch": LIVE,
        "max_queue": LIVE,
        "prefill_chunk": 32,
        "page_size": 4,
        "layouts": ("tp1x4", "tp2x2", "tp4"),
    }
    with Harness(tiny_model("llama_odd", tmp_path), deterministic=True, **settings) as harness:
        harness.engine.wait_for_layouts()
        with harness.paused():
            names = [harness.submit(prompt, 120) for prompt in prompts]
            last = names[-1]
            futures = [harness.switch_when(last, 5 + number, layout) for number, layout in enumerate(WALK * ROUNDS)]
        reports = [future.result(60) for future in futures]
        assert {report.sequences for report in reports} == {LIVE}
        for name in names:
            harness.engine.cancel(name)
        assert {answer.finish for answer in harness.collect(names)} == {FinishReason.CANCELLED}
    copies = [report.transfer_ms / 1000 for report in reports]
    # The least of each kind of switch: a garbage collection or a page fault in one of them says nothing.
    for number, layout in enumerate(WALK):
        least = min(spent[number :: len(WALK)][r] - copies[number :: len(WALK)][r] for r in range(ROUNDS))
        assert least < 0.1, (layout, spent, copies)
