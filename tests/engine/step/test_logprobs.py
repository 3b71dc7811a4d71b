"""Log probabilities against numpy's, whatever the logits look like."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.engine.request import MAX_TOP_LOGPROBS
from nitsum_jax.engine.step import logprobs

ROWS, VOCAB = 6, 5000
jit_logprobs = jax.jit(logprobs.token_logprobs)


def reference(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)))


def make_logits() -> np.ndarray:
    """Usual, flat, one sure token, one sure token before a heavy tail of unlikely ones, ties, and padding."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((ROWS, VOCAB)).astype(np.float32) * 3
    logits[1] = 0.25
    logits[2, 77] = 200
    logits[3] = -17.0 + rng.random(VOCAB).astype(np.float32)  # each 4e-8 of the likeliest, together 3e-4
    logits[3, 1234] = 0
    logits[4] = np.round(logits[4])
    logits[5, 4000:] = -np.inf
    return logits


LOGITS = make_logits()
SAMPLED = np.array([5, 4999, 77, 8, 4321, 3999], np.int32)


def test_they_are_those_of_the_definition() -> None:
    expected = reference(LOGITS)
    out = np.asarray(jit_logprobs(LOGITS, SAMPLED, np.ones(ROWS, bool)))
    assert out.shape == (ROWS, logprobs.COLUMNS)
    for row in range(ROWS):
        answer = logprobs.read(out[row], MAX_TOP_LOGPROBS)
        order = np.lexsort((np.arange(VOCAB), -LOGITS[row]))[:MAX_TOP_LOGPROBS]
        np.testing.assert_allclose(answer.logprob, expected[row, SAMPLED[row]], rtol=1e-6, atol=2e-6)
        assert [token for token, _ in answer.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in answer.top], expected[row, order], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("top", [0, 1, 7])
def test_the_host_reads_as_many_as_were_asked_for(top: int) -> None:
    out = np.asarray(jit_logprobs(LOGITS, SAMPLED, np.ones(ROWS, bool)))
    whole, some = logprobs.read(out[0], MAX_TOP_LOGPROBS), logprobs.read(out[0], top)
    assert some.logprob == whole.logprob
    assert some.top == whole.top[:top]


def test_padding_of_a_small_vocabulary_is_not_told_of() -> None:
    logits = np.array([[1.0, 3.0, 2.0, -np.inf]], np.float32)
    out = jax.jit(logprobs.token_logprobs)(logits, np.array([2], np.int32), np.ones(1, bool))
    answer = logprobs.read(np.asarray(out)[0], MAX_TOP_LOGPROBS)
    assert [token for token, _ in answer.top] == [1, 2, 0]
    assert np.isclose(sum(np.exp([value for _, value in answer.top])), 1)


def test_a_row_does_not_depend_on_who_asks_beside_it() -> None:
    alone = np.asarray(jit_logprobs(LOGITS, SAMPLED, np.arange(ROWS) == 3))
    together = np.asarray(jit_logprobs(LOGITS, SAMPLED, np.ones(ROWS, bool)))
    assert alone[3].tobytes() == together[3].tobytes()


def test_the_form_for_accelerators_says_the_same() -> None:
    at_once = np.asarray(jax.jit(logprobs._token_logprobs)(jnp.asarray(LOGITS), SAMPLED))
    row_by_row = np.asarray(jit_logprobs(LOGITS, SAMPLED, np.ones(ROWS, bool)))
    for a, b in zip(at_once, row_by_row, strict=True):
        one, other = (logprobs.read(row, MAX_TOP_LOGPROBS) for row in (a, b))
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=1e-6, atol=1e-6)
