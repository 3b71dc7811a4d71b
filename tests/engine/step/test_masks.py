"""Masks of tokens: the bits that the host writes, and what a step makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.engine.step.masks import allow, mask_words, no_masks, only, without

VOCAB, PADDED = 93, 96


def bits(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


@pytest.mark.parametrize("token", [0, 1, 31, 32, 63, 92])
def test_a_mask_of_one_token(token: int) -> None:
    assert bits(only(token, VOCAB)) == [token]
    assert only(token, VOCAB).shape == no_masks(1, VOCAB)[0].shape == (3,)


def test_tokens_are_taken_out_unless_nothing_would_be_left() -> None:
    mask = only(3, VOCAB) | only(31, VOCAB) | only(64, VOCAB)
    assert bits(without(mask, (31, 50))) == [3, 64]
    assert bits(without(mask, (3, 31, 64))) == [3, 31, 64]
    assert bits(mask) == [3, 31, 64]


def test_rows_with_a_mask_keep_what_it_allows_and_others_everything() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(-(2**31), 2**31, (4, mask_words(VOCAB))).astype(np.int32)
    logits = rng.standard_normal((4, PADDED)).astype(np.float32)
    masked = np.array([True, False, True, False])
    got = np.asarray(jax.jit(allow)(jnp.asarray(logits), jnp.asarray(masked), jnp.asarray(masks)))
    for row in range(4):
        kept = bits(masks[row]) if masked[row] else range(PADDED)
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(got[row])), list(kept))
        np.testing.assert_array_equal(got[row, list(kept)], logits[row, list(kept)])
