"""Weights that are no numbers: the requests that meet them fail with an error that says so, and nobody else notices."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.models.loading import OpenModel, open_model
from tests.engine.harness import Answer, Harness, eventually
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import generate, random_prompts
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT, VOCAB = "llama_mha", 96
# Token 0 is what pads prompts to the size of a step.
NAN, INF = 0, 7
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.5}


def broken_model(folder: Path, **rows: dict[int, float]) -> OpenModel:
    """A tiny model with rows of some matrices overwritten: name of the matrix, then row and value."""
    folder = tiny_models.write_hf_folder(VARIANT, folder / VARIANT)  # steps are shared by models of one name
    weights = load_file(folder / "model.safetensors")
    for name, changed in rows.items():
        (full,) = [key for key in weights if name in key]
        for row, value in changed.items():
            weights[full][row] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_model(str(folder))


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """An engine whose model knows no numbers for two of its tokens."""
    model = broken_model(tmp_path_factory.mktemp("model"), embed_tokens={NAN: np.nan, INF: np.inf})
    with Harness(model, layouts=("tp1x4", "tp4")) as harness:
        yield harness
        eventually(lambda: harness.engine.stats().running == 0)
        harness.assert_balanced()


@functools.cache
def answerable(prompts: tuple[tuple[int, ...], ...], tokens: int) -> tuple[list[tuple[int, ...]], list[list[int]]]:
    """Those of the prompts that, with their answers of so many tokens, have none of the two; and these answers."""
    sound = [prompt for prompt in prompts if not {NAN, INF} & set(prompt)]
    answers, gap = generate(VARIANT, sound, tokens)
    assert gap > 1e-4
    kept = [(p, a) for p, a in zip(sound, answers, strict=True) if not {NAN, INF} & set(a)]
    return [prompt for prompt, _ in kept], [answer for _, answer in kept]


def assert_refused(answer: Answer, name: str) -> None:
    assert answer.finish is FinishReason.ERROR
    assert answer.tokens == ()
    assert answer.error is not None
    assert f"NaN or infinite logits for request {name} " in answer.error
    assert "\n" not in answer.error
    assert "check the checkpoint" in answer.error
    assert "dtype" in answer.error


@pytest.mark.parametrize("layout", ["tp1x4", "tp4"])
@pytest.mark.parametrize("fields", [{}, SAMPLED, {"logprobs": 3}], ids=["greedy", "sampled", "logprobs"])
def test_who_meets_a_broken_weight_fails_and_its_batch_mates_do_not_notice(
    harness: Harness, layout: str, fields: dict[str, Any]
) -> None:
    harness.switch(layout)
    prompts, expected = answerable(tuple(random_prompts(30, (1, 60), VOCAB, seed=4)), 20)
    assert len(prompts) >= 5
    before = harness.engine.stats().broken_logits
    names, broken = [], []
    for index, prompt in enumerate(prompts):
        bad = NAN if index % 2 else INF
        broken.append(harness.submit((*prompt[: index % 3], bad, *prompt), 20, **fields))
        names.append(harness.submit(prompt, 20))
    assert [list(answer.tokens) for answer in harness.collect(names)] == expected
    for name, answer in zip(broken, harness.collect(broken), strict=True):
        assert_refused(answer, name)
    assert harness.engine.stats().broken_logits == before + len(broken)


@pytest.mark.parametrize("layout", ["tp1x4", "tp4"])
def test_blocks_of_a_broken_request_do_no_harm_to_who_gets_them(harness: Harness, layout: str) -> None:
    """Each of these prompts begins like one that broke behind its first pages, and takes blocks that it left."""
    harness.switch(layout)
    prompts, expected = answerable(tuple(tuple(8 + (7 * i + k) % 88 for i in range(120)) for k in range(8)), 8)
    assert len(prompts) >= 3
    broken = [harness.submit((*prompt[:40], NAN, *prompt[40:]), 8) for prompt in prompts for _ in range(4)]
    for name, answer in zip(broken, harness.collect(broken), strict=True):
        assert_refused(answer, name)
    assert [list(answer.tokens) for answer in harness.run(prompts, 8)] == expected


def test_pages_of_a_broken_request_are_not_shared(harness: Harness) -> None:
    prompt = (NAN, *range(20, 60))
    for name in ("broken", "broken once more"):
        harness.submit(prompt, 4, name=name)
        (answer,) = harness.collect([name])
        assert_refused(answer, name)
        assert harness.recorder.cached_tokens(name) == 0


def test_a_broken_token_in_mid_answer_ends_it_there(tmp_path: Path) -> None:
    """The head says token 7, whose embedding is broken: it goes out, and nothing comes behind it."""
    model = broken_model(tmp_path, embed_tokens={INF: -np.inf})
    with Harness(model, layouts=("tp1x4",)) as harness:
        name = harness.submit((5, 6), 20, logit_bias=((INF, 100.0),))
        (answer,) = harness.collect([name])
        assert answer.tokens == (INF,)
        assert answer.finish is FinishReason.ERROR
        assert f"request {name} after 3 tokens" in str(answer.error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_entry_of_the_vocabulary_is_enough(tmp_path: Path, value: float) -> None:
    """Even where it is -inf, and the token would just never be said."""
    model = broken_model(tmp_path, lm_head={90: value})
    with Harness(model, layouts=("tp1x4",)) as harness:
        name = harness.submit((5, 6), 20, logit_bias=((90, -100.0),))
        assert_refused(harness.collect([name])[0], name)
