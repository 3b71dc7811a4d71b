"""How likely a model finds a text that it is made to say: a fault in the KV cache shows there, if not in the text."""

from collections.abc import Sequence

import numpy as np

from nitsum_jax.engine.live_request import LiveRequest
from tests.engine.harness import Harness
from tests.engine.reference import random_prompts

VOCAB, TOKENS = 93, 90
# A prompt, and the rest of the text.
TEXTS = [random_prompts(1, (size + TOKENS, size + TOKENS), VOCAB, size)[0] for size in (40, 50, 64, 90)]


def likelihoods(
    harness: Harness, walk: Sequence[str] = (), *, every: int = 12, corrupt_at: int | None = None
) -> np.ndarray:
    """Log likelihoods of the tokens of all texts, f64[texts, TOKENS].

    Args:
      harness: whose engine says them, all at once.
      walk: layouts to which it switches meanwhile, after every so many tokens of the first text.
      every: see `walk`.
      corrupt_at: after so many tokens of the first text, one of its blocks gets what another holds.
    """
    with harness.paused():
        names = [harness.submit(text[:-TOKENS], TOKENS, forced_ids=tuple(text[-TOKENS:]), logprobs=0) for text in TEXTS]
        futures = [harness.switch_when(names[0], every * number, layout) for number, layout in enumerate(walk, 1)]
        if corrupt_at is not None:
            harness.recorder.when(names[0], corrupt_at, lambda: corrupt(harness, names[0]))
    answers = harness.collect(names)
    assert [future.result(60).to_layout for future in futures] == list(walk)
    assert [list(answer.tokens) for answer in answers] == [list(text[-TOKENS:]) for text in TEXTS]
    return np.array([[one.logprob for one in harness.recorder.logprobs(name)] for name in names])


def corrupt(harness: Harness, name: str) -> None:
    """Gives a block of a sequence, of one virtual shard, what the one before it holds; on the engine's thread."""
    running, pool = harness.engine._running, harness.engine.cell.pool
    sequence: LiveRequest = running.alive[name]
    (instance,) = [instance for instance in running.instances if instance is sequence.home]
    device, (before, block) = instance.device_of[0], sequence.page_table[0, :2]
    instance.lend_pool()
    array = pool.array(device)
    pool.replace(device, array.at[block].set(array[before]))
    instance.regain_pool()
