"""Every variant of attention and norm in steps: a prompt in chunks, switches, decoding, and the same bits at every TP.

The logits are those that transformers has of the whole sequence, so what lies in the pool is right, too.
"""

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
VARIANTS = ("mistral_window", "gemma2", "gemma3", "phi3", "olmo2", "granite", "smollm3")
# Compiled as users do, one layer: windows with caps and products that are added (of every second layer), and norms over
# heads that lie on several devices (and, of KV heads, on two each).
BITS = [
    *(("gemma2", PREFILL, (1, 2)), ("gemma2", DECODE, (1, 4))),
    *(("olmo2", PREFILL, (1, 4)), ("olmo2", DECODE, (1, 2))),
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(tiny_models.__file__).with_name("tiny_logits.npz")) as file:
        return dict(file)


def rig_of(variant: str, layers: int | None = None) -> StepRig:
    return StepRig(variant, "float32", vshards=4, batch=2, max_model_len=64, layers=layers)


def rows(variant: str) -> Iterator[tuple[StepShape, Row]]:
    """The steps over the tiny sequence."""
    tokens = tiny_models.token_ids(variant)[0].tolist()
    done = 0
    for count in (*CHUNKS, *[1] * (len(tokens) - sum(CHUNKS))):
        yield (PREFILL if done < sum(CHUNKS) else DECODE), Row(done, tuple(tokens[done : done + count]))
        done += count


@pytest.mark.parametrize("variant", VARIANTS)
def test_chunks_and_decoding_across_switches_give_the_logits_of_transformers(
    variant: str, golden: dict[str, np.ndarray]
) -> None:
    rig = rig_of(variant)
    blocks, vocab = np.zeros_like(rig.past), rig.cut.config.vocab_size
    with compiling_quickly():  # it rounds differently
        for shape, row in rows(variant):
            outcome = rig.run([row], shape, 4 if shape.is_decode else 1, blocks)
            expected = golden[variant][0, row.context + len(row.tokens) - 1]
            np.testing.assert_allclose(outcome.logits[0, :vocab], expected, rtol=0, atol=TOLERANCE)
            blocks = outcome.blocks


@pytest.mark.parametrize(("variant", "shape", "tps"), BITS)
def test_every_tp_gives_the_same_bits(variant: str, shape: StepShape, tps: tuple[int, int]) -> None:
    rig = rig_of(variant, layers=1)
    rig.compile_all((shape, tp) for tp in tps)
    for context in (0, 5, 40):
        row = Row(context, tuple(range(3, 3 + shape.tokens)))
        one, other = (rig.run([row], shape, tp) for tp in tps)
        assert one.logits[0, : rig.cut.config.vocab_size].std() > 0.5  # there is something to differ
        np.testing.assert_array_equal(one.logits[0].view(np.uint32), other.logits[0].view(np.uint32))
        np.testing.assert_array_equal(one.blocks.view(np.uint32), other.blocks.view(np.uint32))
