"""The demo model answers as transformers does (tests/golden): same greedy tokens and logits, at every degree."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.packing import Packer, StepShape, sampling_columns
from nitsum_jax.engine.step.program import StepState, compile_step
from nitsum_jax.errors import PreconditionError
from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.loading import OpenModel, open_model
from nitsum_jax.models.registry import KNOWN_MODELS, fetch
from tests.engine.harness import Harness
from tests.golden import tiny_models

GOLDEN = Path(tiny_models.__file__).parent
STEPS = 48
TPS = (1, 2, 4)
# A step of 30 layers compiles for 20 s.  Logits are compared at the ends; in between, the tokens that follow from them.
LOGITS_TPS = (1, 4)
POOL_GIB = 0.125


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((GOLDEN / "smollm2_135m.json").read_text(encoding="utf-8"))["prompts"]
    assert len(entries) >= 16
    return entries


@pytest.fixture(scope="module")
def model() -> OpenModel:
    try:
        fetch(KNOWN_MODELS["smollm2-135m"])
    except PreconditionError as error:  # 98 MB that can neither be found in the cache nor be downloaded
        pytest.skip(str(error))
    return open_model("smollm2-135m")


@pytest.fixture(scope="module")
def harness(model: OpenModel, prompts: list[dict[str, Any]]) -> Iterator[Harness]:
    # One instance and one bucket per phase: all prompts are one batch, and few steps are compiled.
    settings: dict[str, Any] = {"layouts": ("tp1", "tp2", "tp4"), "max_batch": len(prompts), "deterministic": True}
    # The pool is as large as the longest of them together need; what is more would only be filled with zeros.
    with Harness(model, **settings, max_model_len=512, prefill_chunk=64, kv_cache_gib=POOL_GIB) as harness:
        yield harness


@pytest.mark.parametrize("tp", TPS)
def test_greedy_answers(harness: Harness, prompts: list[dict[str, Any]], tp: int) -> None:
    harness.switch(f"tp{tp}")
    answers = harness.run([entry["prompt_ids"] for entry in prompts], STEPS)
    for entry, answer in zip(prompts, answers, strict=True):
        assert list(answer.tokens) == entry["output_ids"], entry["name"]
    assert harness.engine.stats().sent_back == 0
    harness.assert_balanced()


def test_logits_at_the_end_of_a_prompt(harness: Harness, prompts: list[dict[str, Any]]) -> None:
    shape = StepShape(1, 64)
    with np.load(GOLDEN / "smollm2_135m.npz") as file:
        golden = dict(file)
    chosen = [entry for entry in prompts if f"logits.{entry['name']}" in golden]
    chosen = [entry for entry in chosen if len(entry["prompt_ids"]) <= shape.tokens]
    assert len(chosen) >= 3
    at_first_tp: dict[str, np.ndarray] = {}
    for tp in LOGITS_TPS:
        run = LogitsOfPrompt(harness, tp, shape)
        for entry in chosen:
            name, logits = entry["name"], run(entry["prompt_ids"])
            np.testing.assert_allclose(logits, golden[f"logits.{name}"], rtol=0, atol=2e-3)
            bits = at_first_tp.setdefault(name, logits.view(np.uint32))
            np.testing.assert_array_equal(logits.view(np.uint32), bits)


class LogitsOfPrompt:
    """A step of the engine's own program and weights that also gives its logits, on a pool of its own."""

    def __init__(self, harness: Harness, tp: int, shape: StepShape):
        cell = harness.engine._cell
        (spec,) = next(layout for layout in cell.known_layouts() if layout.instances[0].tp == tp).instances
        self._mesh = cell.geometries.of(spec.devices).mesh
        self._shape = shape
        pages = shape.tokens // cell.program.pool.page_size
        pool = dataclasses.replace(cell.program.pool, blocks=pages * cell.vmap.num_vshards)
        self._program = dataclasses.replace(cell.program, pool=pool)
        self._leaves = cell.leaves(spec)
        self._step = compile_step(self._program, shape, self._mesh, with_logits=True)

    def __call__(self, prompt: list[int]) -> np.ndarray:
        program, vshards = self._program, self._program.cut.num_vshards
        packer = Packer(self._shape, vshards, program.pages, program.max_batch)
        used = -(-len(prompt) // program.pool.page_size)
        page_table = np.arange(vshards * used, dtype=np.int32).reshape(vshards, used)
        columns = sampling_columns(SamplingParams(), 0, len(prompt))
        packer.add(columns, row=0, context=0, tokens=prompt, emit=True, page_table=page_table)
        along, everywhere = (NamedSharding(self._mesh, spec) for spec in (PartitionSpec(TP_AXIS), PartitionSpec()))
        tp = self._mesh.devices.size
        whole = (program.pool.blocks * tp, *program.pool.block_shape)
        pool = jax.jit(lambda: jnp.zeros(whole, program.pool.storage_dtype), out_shardings=along)()
        history = jax.device_put(np.zeros(program.history_shape, np.int32), everywhere)
        _, results = self._step(self._leaves, StepState(pool, history), packer.done(), program.no_masks(self._shape))
        return np.asarray(results.logits)[0, : program.config.vocab_size]
