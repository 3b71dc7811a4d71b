"""Embeddings: what the engine makes of a prompt, held to the logits that transformers made of it.

The tiny models have more tokens than dimensions, so the output of the last layer follows from the logits and the head.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from nitsum_jax.engine.request import Request, check_request
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.models.loading import OpenModel
from nitsum_jax.models.pooling import Pooling
from tests.engine.harness import Harness, tiny_model
from tests.engine.quick import compiling_quickly
from tests.models.golden import tiny_models

VARIANT = "qwen3"
LAYOUTS = ("tp1x4", "tp4")
CHUNK = 16  # prompts of 24 tokens take two steps
GOLDEN = Path(tiny_models.__file__).parent / "tiny_logits.npz"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model(VARIANT, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module", params=list(Pooling))
def engine(model: OpenModel, request: pytest.FixtureRequest) -> Iterator[Harness]:
    pooling = request.param
    settings = {"layouts": LAYOUTS, "prefill_chunk": CHUNK, "max_batch": 1, "pooling": pooling.value}
    with Harness(model, **settings) as harness:
        yield harness


def prompts() -> list[list[int]]:
    return tiny_models.token_ids(VARIANT).tolist()


def expected(pooling: Pooling) -> np.ndarray:
    """By transformers' logits, f64[sequences, D]."""
    logits = np.load(GOLDEN)[VARIANT].astype(np.float64)
    head = tiny_models.tensors(VARIANT)["lm_head.weight"].astype(np.float64)
    outputs = logits @ np.linalg.pinv(head).T
    pooled = outputs[:, -1] if pooling is Pooling.LAST else outputs.mean(1)
    return pooled / np.linalg.norm(pooled, axis=-1, keepdims=True)


def embed(engine: Harness, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    names = [engine.submit(prompt, 1, pooling=pooling_of(engine)) for prompt in prompts]
    engine.collect(names)
    return np.stack([engine.recorder.embedding(name) for name in names])


def pooling_of(engine: Harness) -> Pooling:
    pooling = engine.engine.request_limits().pooling
    assert pooling is not None
    return pooling


def test_vectors_are_those_of_transformers_and_the_same_bits_at_every_tp(engine: Harness) -> None:
    found = []
    for layout in LAYOUTS:
        engine.switch(layout)
        found.append(embed(engine, prompts()))
        np.testing.assert_allclose(found[-1], expected(pooling_of(engine)), atol=2e-5)
        np.testing.assert_allclose(np.linalg.norm(found[-1], axis=1), 1, rtol=1e-6)
    assert [one.tobytes() for one in found] == [found[0].tobytes()] * len(LAYOUTS)


def test_what_the_prefix_cache_has_changes_no_vector(engine: Harness) -> None:
    (first,) = embed(engine, prompts()[:1])
    again, other = embed(engine, [prompts()[0], [*prompts()[0][:20], *prompts()[1][:8]]])
    alone = embed(engine, [[*prompts()[0][:20], *prompts()[1][:8]]])[0]
    np.testing.assert_allclose(again, first, atol=1e-5)
    np.testing.assert_allclose(other, alone, atol=1e-5)


def test_beside_streams_and_through_a_switch(engine: Harness) -> None:
    engine.switch("tp1x4")
    streams = [engine.submit(prompt, 40) for prompt in prompts()]
    engine.wait_for_tokens(streams[0], 3)
    moved = engine.switch_when(streams[0], 6, "tp4")
    many = embed(engine, prompts() * 8)
    moved.result()
    np.testing.assert_allclose(many, np.tile(expected(pooling_of(engine)), (8, 1)), atol=2e-5)
    assert all(answer.error is None and len(answer.tokens) == 40 for answer in engine.collect(streams))
    engine.assert_balanced()


def test_prompts_that_are_started_over_are_counted_once(model: OpenModel) -> None:
    # Room for two of the sequences: they send each other back in the middle of their prompts.
    blocks = {"max_model_len": 64, "kv_cache_gib": 2 * 64 * model.config.num_layers * 2 * 3 * 16 * 4 / 2**30}
    settings = {"devices": 1, "layouts": ("tp1",), "prefill_chunk": 2, "prefix_cache": False, "pooling": "mean"}
    with compiling_quickly(), Harness(model, **(settings | blocks)) as harness:
        streams = [harness.submit(prompt[:10], 50) for prompt in prompts()]
        found = embed(harness, prompts() * 4)
        harness.collect(streams)
        assert harness.engine.stats().sent_back
        np.testing.assert_allclose(found, np.tile(expected(Pooling.MEAN), (4, 1)), atol=2e-5)


def test_wrong_requests_are_refused(engine: Harness, model: OpenModel) -> None:
    limits, pooling = engine.engine.request_limits(), pooling_of(engine)
    with pytest.raises(InvalidInputError, match="give max_tokens=1"):
        engine.submit([1, 2], 2, pooling=pooling)
    other = next(kind for kind in Pooling if kind is not pooling)
    with pytest.raises(PreconditionError, match=f"pooling={pooling} here, not {other}"):
        engine.submit([1, 2], 1, pooling=other)
    with pytest.raises(PreconditionError, match=r"this model gives no embeddings: .* --pooling=last"):
        check_request(Request("r", (1, 2), 1, pooling=pooling), dataclasses.replace(limits, pooling=None))
    with pytest.raises(InvalidInputError, match="pooling=cls is not known: give one of auto, none, last, mean"):
        Harness(model, pooling="cls")
