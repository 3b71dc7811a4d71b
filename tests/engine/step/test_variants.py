"""Every variant of attention and norm in steps: a prompt in chunks, a switch, decoding, and the same bits at every TP.

The logits are those that transformers has of the whole sequence, so what lies in the pool is right, too.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nitsum_jax.engine.step.packing import StepShape
from tests.engine.quick import compiling_quickly
from tests.engine.rig import Row, StepRig
from tests.models.golden import tiny_models

PREFILL, DECODE = StepShape(1, 16), StepShape(2, 1)
CHUNKS = (16, 3)  # a whole one, and one with padding; what follows is decoded
TOLERANCE = 1e-4
# Compiled as users do, and compared to the bit at 1, 2 and 4 devices: windows with caps and products that are added,
# and norms over heads that lie on several devices (and, of KV heads, on two each).
TO_THE_BIT = ("gemma2", "olmo2")
# Compiled in less time, which rounds otherwise: a chunk at one TP, the next at another, decoding at a third.
UP_TO_ROUNDING = ("llama_yarn", "mistral_window", "gemma3", "phi3", "granite", "smollm3")


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(tiny_models.__file__).with_name("tiny_logits.npz")) as file:
        return dict(file)


def rig_of(variant: str) -> StepRig:
    return StepRig(variant, "float32", vshards=4, batch=2, max_model_len=64)


def parts(variant: str) -> Iterator[tuple[StepShape, Row, np.ndarray]]:
    """The steps over the tiny sequence: shape, row, and the logits behind its last token."""
    tokens, logits = tiny_models.token_ids(variant)[0].tolist(), golden()[variant][0]
    done = 0
    for count in (*CHUNKS, *[1] * (len(tokens) - sum(CHUNKS))):
        shape = PREFILL if done < sum(CHUNKS) else DECODE
        yield shape, Row(done, tuple(tokens[done : done + count])), logits[done + count - 1]
        done += count


@pytest.mark.parametrize("variant", TO_THE_BIT)
def test_every_tp_gives_the_same_bits_and_the_logits_of_transformers(variant: str) -> None:
    rig = rig_of(variant)
    rig.compile_all((shape, tp) for shape in (PREFILL, DECODE) for tp in (1, 2, 4))
    blocks, vocab = np.zeros_like(rig.past), rig.cut.config.vocab_size
    for number, (shape, row, expected) in enumerate(parts(variant)):
        outcomes = [rig.run([row], shape, tp, blocks) for tp in (1, 2, 4)]
        for outcome in outcomes:
            np.testing.assert_allclose(outcome.logits[0, :vocab], expected, rtol=0, atol=TOLERANCE)
            np.testing.assert_array_equal(outcome.logits[0].view(np.uint32), outcomes[0].logits[0].view(np.uint32))
            np.testing.assert_array_equal(outcome.blocks.view(np.uint32), outcomes[0].blocks.view(np.uint32))
        blocks = outcomes[number % 3].blocks  # a switch after every step


@pytest.mark.parametrize("variant", UP_TO_ROUNDING)
def test_chunks_and_decoding_across_switches_give_the_logits_of_transformers(variant: str) -> None:
    rig = rig_of(variant)
    blocks, vocab = np.zeros_like(rig.past), rig.cut.config.vocab_size
    with compiling_quickly():
        for shape, row, expected in parts(variant):
            outcome = rig.run([row], shape, 4 if shape.is_decode else 1, blocks)
            blocks = outcome.blocks
            np.testing.assert_allclose(outcome.logits[0, :vocab], expected, rtol=0, atol=TOLERANCE)
            assert outcome.sampled[0] == expected.argmax()
