"""Requests that begin alike, in a running engine: less is computed, nothing else changes, also across switches."""

from collections.abc import Iterator

import numpy as np
import pytest

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import random_prompts

pytestmark = pytest.mark.usefixtures("quick_compiles")

VOCAB, PAGE = 93, 16
BEGINNING = random_prompts(1, (100, 100), VOCAB, 0)[0]
ENDS = random_prompts(6, (5, 30), VOCAB, 1)
PROMPTS = [[*BEGINNING, *end] for end in ENDS]
SAMPLING = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "presence_penalty": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model("llama_odd", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def harness(model: OpenModel) -> Iterator[Harness]:
    with Harness(model, layouts=("tp1x4", "tp2x2"), layout="tp1x4") as harness:
        harness.engine.wait_for_layouts()
        yield harness


def forget(harness: Harness) -> None:
    with harness.paused():
        cache = harness.engine.cell.prefixes
        assert cache is not None
        cache.forget(range(4))


def hits(harness: Harness) -> int:
    return harness.engine.stats().prefix_hit_tokens


@pytest.fixture(scope="module")
def cold(harness: Harness) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What each prompt is answered, greedily and by sampling, without anything shared."""
    answers = []
    for prompt in PROMPTS:
        both = []
        for sampling in ({}, SAMPLING):
            forget(harness)
            before = hits(harness)
            (answer,) = harness.run([prompt], 12, **sampling)
            assert hits(harness) == before
            both.append(answer.tokens)
        answers.append((both[0], both[1]))
    return answers


def test_a_beginning_is_computed_once_and_answers_stay_the_same(
    harness: Harness, cold: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    forget(harness)
    before = harness.engine.stats()
    for prompt, (greedy, sampled) in zip(PROMPTS, cold, strict=True):
        assert harness.run([prompt], 12)[0].tokens == greedy
        assert harness.run([prompt], 12, **SAMPLING)[0].tokens == sampled
    after = harness.engine.stats()
    queried = after.prefix_queried_tokens - before.prefix_queried_tokens
    found = after.prefix_hit_tokens - before.prefix_hit_tokens
    assert queried == 2 * sum(map(len, PROMPTS))
    # The beginning but for its last page, of all but the first; of each prompt's second run all but the last page.
    assert found >= (len(PROMPTS) - 1) * 96 + sum((len(prompt) - 1) // PAGE * PAGE for prompt in PROMPTS)
    assert after.blocks_cached > 0
    harness.assert_balanced()


def test_a_burst_computes_its_beginning_once(harness: Harness, cold: list[tuple[tuple[int, ...], ...]]) -> None:
    """All are admitted at once, before the first has computed anything."""
    forget(harness)
    before = hits(harness)
    with harness.paused():
        names = [harness.submit(PROMPTS[0], 12) for _ in range(8)]
    answers = harness.collect(names)
    assert {answer.tokens for answer in answers} == {cold[0][0]}
    # Two on each device: the second finds what the first has computed.
    assert hits(harness) - before >= 4 * 96
    cached = [harness.recorder.cached_tokens(name) for name in names]
    assert sum(cached) == hits(harness) - before
    assert max(cached) < len(PROMPTS[0])  # the last token is always computed
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()


def test_what_was_cached_is_found_behind_a_switch(
    harness: Harness, cold: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    forget(harness)
    harness.run([PROMPTS[0]], 12)
    report = harness.switch("tp2x2")
    assert report.kv_bytes_moved == 0  # nobody lives: pages stay where they are
    before = hits(harness)
    assert harness.run([PROMPTS[1]], 12)[0].tokens == cold[1][0]
    assert hits(harness) - before == 96  # what lies on other devices was copied
    harness.switch("tp1x4")
    assert harness.run([PROMPTS[2]], 12, **SAMPLING)[0].tokens == cold[2][1]
    assert hits(harness) - before == 2 * 96
    harness.assert_balanced()


def test_sequences_that_share_pages_go_on_behind_a_switch(
    harness: Harness, cold: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    forget(harness)
    harness.run([PROMPTS[0]], 12)
    with harness.paused():
        names = [harness.submit(prompt, 12) for prompt in PROMPTS]
        there = harness.switch_when(names[0], 2, "tp2x2")
        back = harness.switch_when(names[5], 7, "tp1x4")
    answers = harness.collect(names)
    assert [answer.tokens for answer in answers] == [greedy for greedy, _ in cold]
    for future in (there, back):
        assert future.result(60).requeued == 0
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()


def test_a_cancelled_request_leaves_its_pages_to_others(
    harness: Harness, cold: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    forget(harness)
    name = harness.submit(PROMPTS[3], 100)
    harness.recorder.when(name, 2, lambda: harness.engine.cancel(name))
    assert harness.collect([name])[0].finish == FinishReason.CANCELLED
    before = hits(harness)
    assert harness.run([PROMPTS[3]], 12)[0].tokens == cold[3][0]
    assert hits(harness) - before >= 96


def test_what_a_request_finds_of_itself_when_it_is_computed_again_is_no_hit(
    harness: Harness, cold: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    forget(harness)
    harness.run([PROMPTS[0]], 1)
    before = harness.engine.stats()
    running = harness.engine._running
    name = harness.submit(PROMPTS[4], 12)
    send_back = lambda: running.post(lambda: running._admission._send_back(running.alive[name]))  # noqa: E731
    harness.recorder.when(name, 2, send_back)
    assert harness.collect([name])[0].tokens == cold[4][0]
    after = harness.engine.stats()
    assert after.sent_back == before.sent_back + 1
    assert after.prefix_hit_tokens - before.prefix_hit_tokens == harness.recorder.cached_tokens(name) == 96
    eventually(lambda: harness.engine.stats().running == 0)
    harness.assert_balanced()


# ---- what else a request can ask for


def test_log_probabilities_come_with_every_token(harness: Harness) -> None:
    deltas: list[object] = []
    for top in (None, 0, 3):
        names = [harness.submit(prompt, 10, logprobs=top, temperature=0.7, seed=1) for prompt in PROMPTS[:3]]
        harness.collect(names)
        found = [(delta.token_ids, delta.logprobs) for name in names for delta in list(harness.recorder._deltas[name])]
        deltas.append([ids for ids, _ in found])
        for ids, logprobs in found:
            assert len(logprobs) == (0 if top is None else len(ids))
            for token, logprob in zip(ids, logprobs, strict=False):
                assert len(logprob.top) == top
                assert all(value <= 0 for _, value in logprob.top)
                assert [value for _, value in logprob.top] == sorted((v for _, v in logprob.top), reverse=True)
                if token in dict(logprob.top):
                    assert dict(logprob.top)[token] == logprob.logprob
                elif logprob.top:
                    assert logprob.logprob <= logprob.top[-1][1]
    assert harness.run([PROMPTS[0]], 6, logprobs=1)[0].tokens  # greedy: the chosen one is the likeliest
    name = f"request {harness._names}"
    for delta in list(harness.recorder._deltas[name]):
        for token, logprob in zip(delta.token_ids, delta.logprobs, strict=True):
            assert logprob.top == ((token, logprob.logprob),)


def test_bias_and_least_tokens_rule_what_is_said(harness: Harness) -> None:
    (free,) = harness.run([PROMPTS[4]], 12)
    first, second = free.tokens[:2]
    assert harness.run([PROMPTS[4]], 5, logit_bias=((7, 100.0),))[0].tokens == (7,) * 5
    (without,) = harness.run([PROMPTS[4]], 12, logit_bias=((first, -100.0),))
    assert first not in without.tokens
    stopped = harness.run([PROMPTS[4]], 12, stop_token_ids=(first, second))[0]
    assert (stopped.tokens, stopped.finish) == ((), FinishReason.STOP)
    (later,) = harness.run([PROMPTS[4]], 12, stop_token_ids=(first, second), min_tokens=4)
    assert len(later.tokens) >= 4
    assert not {first, second} & set(later.tokens)


def test_steering_goes_along_with_a_switch(harness: Harness) -> None:
    (expected,) = harness.run([PROMPTS[5]], 24, logit_bias=((7, 4.0), (9, -100.0)), temperature=0.8, seed=4)
    name = harness.submit(PROMPTS[5], 24, logit_bias=((7, 4.0), (9, -100.0)), temperature=0.8, seed=4)
    future = harness.switch_when(name, 5, "tp2x2")
    assert harness.collect([name])[0].tokens == expected.tokens
    future.result(60)
    harness.switch("tp1x4")


def test_the_first_token_is_penalised_for_the_whole_prompt(harness: Harness) -> None:
    """The last chunk of the prompt counts too, which is not in the history before its own step."""
    early = 0
    for seed in range(4):
        prompt = np.random.default_rng(seed).permutation(VOCAB).tolist()  # chunks of 32, 32 and 29
        (free,) = harness.run([prompt], 1)
        early += free.tokens[0] in prompt[:64]
        # All tokens are in the prompt and penalised alike, so the best stays the best.
        assert harness.run([prompt], 1, repetition_penalty=100.0)[0].tokens == free.tokens
    assert early  # would lose to any token of the last chunk, if those went without a penalty
