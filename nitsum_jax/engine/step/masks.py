"""Which tokens may be chosen, as bits: how the host writes them and how a step reads them.

A mask is i32[W], bit t % 32 of word t // 32 for token t.  The masks of a step are an input of their own, beside the
packed one.  A step of which no row has a mask is given zeros that lie on the device already, so they cost no transfer,
and does not look at them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def mask_words(vocab: int) -> int:
    """W, words of a mask for so many tokens."""
    return -(-vocab // 32)


def no_masks(batch: int, vocab: int) -> np.ndarray:
    """The input of a step that has no mask, i32[B, W]."""
    return np.zeros((batch, mask_words(vocab)), np.int32)


def only(token: int, vocab: int) -> np.ndarray:
    """The mask that allows one token."""
    mask = np.zeros(mask_words(vocab), np.uint32)
    mask[token // 32] = 1 << (token % 32)
    return mask.view(np.int32)


def without(mask: np.ndarray, tokens: tuple[int, ...]) -> np.ndarray:
    """A mask without some of its tokens; as it is if nothing would be left."""
    rest = mask.copy()
    words = rest.view(np.uint32)
    for token in tokens:
        words[token // 32] &= np.uint32(~(1 << (token % 32)) & 0xFFFFFFFF)
    return rest if rest.any() else mask


def allow(logits: jax.Array, masked: jax.Array, masks: jax.Array) -> jax.Array:
    """Takes what is not allowed out of the rows that have a mask: f32[B, V].

    Args:
      logits: f32[B, V].
      masked: bool[B], whether the row has one; others come out unchanged to the bit.
      masks: i32[B, W]; what is behind the last word is not allowed.
    """
    vocab = logits.shape[1]
    token = lax.broadcasted_iota(jnp.int32, (1, vocab), 1)[0]
    words = jnp.take(masks, token >> 5, axis=1, mode="fill", fill_value=0)
    allowed = (lax.shift_right_logical(words, jnp.broadcast_to(token & 31, words.shape)) & 1) > 0
    return jnp.where(allowed | ~masked[:, None], logits, -jnp.inf)
