"""Switches with int4 weights and an int8 KV cache change no token, and memory is what the plan says."""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest

from nitsum_jax.models.loading import open_model
from tests.engine.harness import Harness, eventually
from tests.engine.quantised_model import CONFIG, tensors
from tests.engine.reference import random_prompts
from tests.models.checkpoint.helpers import write_hf

SWITCHES = 30
LAYOUTS = ("tp1x2", "tp2")
PROMPTS = [random_prompts(1, (size, size), 96, size)[0] for size in (1, 20, 33, 60)]
LENGTHS = (90, 40, 120, 70)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    config = dataclasses.replace(CONFIG, vocab_size=300)
    folder = write_hf(tmp_path_factory.mktemp("model"), config, tensors(config))
    settings = {"devices": 2, "layouts": LAYOUTS, "max_batch": 4, "quantization": "int4", "kv_dtype": "int8"}
    with Harness(open_model(str(folder)), deterministic=True, **settings) as harness:
        harness.engine.wait_for_layouts()
        yield harness


def test_the_plan_reckons_with_what_lies_on_the_devices(harness: Harness) -> None:
    cell = harness.engine._cell
    for device in range(2):
        held = [buffer for by_vshard in cell.bank._buffers[device].values() for buffer in by_vshard.values()]
        resident = sum(buffer.nbytes for buffer in held)
        assert cell.memory.weights == pytest.approx(resident, rel=0.03)
    everything = 4 * sum(value.size for value in tensors(cell.program.config).values())
    assert cell.memory.weights < everything / 4


def test_no_switch_changes_a_token(harness: Harness) -> None:
    def submit(index: int) -> str:
        sampled: dict[str, Any] = {"temperature": 1.0, "seed": 5} if index % 2 else {}
        return harness.submit(PROMPTS[index], LENGTHS[index], **sampled)

    undisturbed = [answer.tokens for answer in harness.collect([submit(index) for index in range(len(PROMPTS))])]
    assert len({tokens[:20] for tokens in undisturbed}) == len(PROMPTS)
    rng = random.Random(3)
    running: list[tuple[int, str]] = []
    done: list[tuple[int, str]] = []
    for number in range(SWITCHES):
        while len(running) < 4:
            index = rng.randrange(len(PROMPTS))
            running.append((index, submit(index)))
        report = harness.switch(LAYOUTS[(number + 1) % 2])
        assert report.weight_bytes_moved == 0
        done += [item for item in running if harness.recorder.finished(item[1])]
        running = [item for item in running if not harness.recorder.finished(item[1])]
    done += running
    answers = harness.collect([name for _, name in done])
    assert [answer.tokens for answer in answers] == [undisturbed[index] for index, _ in done]
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()
