"""The demo model answers as transformers does: same greedy tokens and likelihoods, at TP 1 and 4."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nitsum_jax.bench.evals.reference import read_reference
from nitsum_jax.engine.request import MAX_TOP_LOGPROBS, TokenLogprob
from nitsum_jax.errors import PreconditionError
from nitsum_jax.models.known.registry import KNOWN_MODELS, fetch
from nitsum_jax.models.loading import OpenModel, open_model
from tests.engine.harness import Harness
from tests.models.golden import tiny_models

GOLDEN = Path(tiny_models.__file__).parent
STEPS = 48
POOL_GIB = 0.125


@dataclasses.dataclass(frozen=True)
class Spoken:
    """A continuation: its tokens, and of each the likelihoods of the most likely ones."""

    tokens: list[int]
    logprobs: list[TokenLogprob]


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
    settings: dict[str, Any] = {"layouts": ("tp1", "tp4"), "max_batch": len(prompts), "deterministic": True}
    # The pool is as large as the longest of them together need; what is more would only be filled with zeros.
    with Harness(model, **settings, max_model_len=512, prefill_chunk=64, kv_cache_gib=POOL_GIB) as harness:
        yield harness


@pytest.fixture(scope="module")
def at_tp_1(harness: Harness, prompts: list[dict[str, Any]]) -> list[Spoken]:
    return speak(harness, prompts, 1)


def speak(harness: Harness, prompts: list[dict[str, Any]], tp: int) -> list[Spoken]:
    """Continues the prompts greedily."""
    harness.switch(f"tp{tp}")
    names = [harness.submit(entry["prompt_ids"], STEPS, logprobs=MAX_TOP_LOGPROBS) for entry in prompts]
    answers = harness.collect(names)
    assert harness.engine.stats().sent_back == 0
    harness.assert_balanced()
    return [
        Spoken(list(answer.tokens), harness.recorder.logprobs(name))
        for name, answer in zip(names, answers, strict=True)
    ]


def test_greedy_answers(at_tp_1: list[Spoken], prompts: list[dict[str, Any]]) -> None:
    for entry, spoken in zip(prompts, at_tp_1, strict=True):
        assert spoken.tokens == entry["output_ids"], entry["name"]


def test_likelihoods_at_the_end_of_a_prompt(at_tp_1: list[Spoken], prompts: list[dict[str, Any]]) -> None:
    """Those of the twenty most likely tokens, each of which is a matter of all logits."""
    with np.load(GOLDEN / "smollm2_135m.npz") as file:
        golden = dict(file)
    compared = 0
    for entry, spoken in zip(prompts, at_tp_1, strict=True):
        logits = golden.get(f"logits.{entry['name']}")
        if logits is not None:
            expected = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
            ids, found = zip(*spoken.logprobs[0].top, strict=True)
            np.testing.assert_allclose(found, expected[list(ids)], rtol=0, atol=2e-3)
            assert set(ids) >= {token for token in np.argsort(-expected) if expected[token] > min(found) + 4e-3}
            compared += 1
    assert compared >= 3


def test_texts_are_as_likely_as_nitsum_bench_evals_says(harness: Harness) -> None:
    """Token by token, as its client asks; within the tolerance that it has for float32."""
    texts = read_reference(None).texts
    names = [harness.submit(text.ids[:1], len(text.ids) - 1, forced_ids=text.ids[1:], logprobs=0) for text in texts]
    harness.collect(names)
    for name, text in zip(names, texts, strict=True):
        found = [one.logprob for one in harness.recorder.logprobs(name)]
        np.testing.assert_allclose(found, text.logprobs, rtol=0, atol=1e-3)


def test_a_higher_degree_of_parallelism_says_the_same_with_the_same_bits(
    harness: Harness, at_tp_1: list[Spoken], prompts: list[dict[str, Any]]
) -> None:
    """TP 4, where heads, groups and vocabulary are padded; others are compared with smaller models."""
    assert speak(harness, prompts, 4) == at_tp_1  # floats that are equal have the same bits: there is no zero or NaN
    assert all(one.logprob < 0 for spoken in at_tp_1 for one in spoken.logprobs)
