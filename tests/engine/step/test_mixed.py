"""A mixed step: the right numbers, and the bits of a row depend neither on who shares the step nor on the TP."""

import dataclasses

import numpy as np
import pytest

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.engine.step.packing import StepShape
from tests.engine.quick import compiling_quickly
from tests.engine.rig import Outcome, Row, StepRig

SHAPE = StepShape(1, 16, 8)
TPS = (1, 2, 4)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.1, seed=7, logit_bias=((3, 2.5), (8, -100)))
CHUNK = Row(100, tuple((11 * i + 5) % 96 for i in range(12)), SAMPLED, logprobs=True)
DECODES = (Row(3, (9,), logprobs=True), Row(130, (8,), SAMPLED, stops=(5, 9)), Row(16, (7,)))
# Others in the same places of the step: a prompt that begins and fills the chunk, and rows of other lengths.
OTHER_CHUNK = Row(0, tuple(range(3, 19)))
OTHER_DECODES = (Row(128, (1,), SAMPLED), Row(7, (2,)), Row(140, (33,)), Row(15, (4,)), Row(1, (5,)))


@pytest.fixture(scope="module")
def rig() -> StepRig:
    """One layer, compiled as users compile: grouped heads, a tied head, and padded heads of virtual shards."""
    rig = small()
    rig.compile_all((SHAPE, tp) for tp in TPS)
    return rig


def small() -> StepRig:
    return StepRig("llama_gqa_tied", "float32", vshards=4, batch=9, max_model_len=160, layers=1)


def same(actual: Outcome, expected: Outcome, rows: slice, rig: StepRig) -> None:
    """All that a step says of these rows, and writes for them, is the same in every bit."""
    own = rig.page_table[rows].reshape(-1)
    for field in dataclasses.fields(Outcome):
        a, b = getattr(actual, field.name), getattr(expected, field.name)
        part = own if field.name == "blocks" else rows
        assert np.array_equal(a[part].view("u4"), b[part].view("u4")), field.name


def test_every_degree_of_parallelism_gives_the_same_bits(rig: StepRig) -> None:
    first, *others = [rig.run([CHUNK, *DECODES], SHAPE, tp) for tp in TPS]
    assert first.logits[:4, :96].std() > 1
    for other in others:
        same(other, first, slice(0, 9), rig)


@pytest.mark.parametrize("tp", TPS)
def test_who_else_is_in_the_step_changes_no_bit(rig: StepRig, tp: int) -> None:
    whole = rig.run([CHUNK, *DECODES], SHAPE, tp)
    same(rig.run([CHUNK, *OTHER_DECODES], SHAPE, tp), whole, slice(0, 1), rig)
    same(rig.run([OTHER_CHUNK, *DECODES, *OTHER_DECODES], SHAPE, tp), whole, slice(1, 4), rig)
    alone = rig.run([CHUNK], SHAPE, tp)
    same(alone, whole, slice(0, 1), rig)
    untouched = np.setdiff1d(np.arange(rig.program.pool.blocks), rig.page_table[0])
    np.testing.assert_array_equal(alone.blocks[untouched], rig.past[untouched])  # nor does padding write


def test_it_computes_what_a_prefill_and_a_decode_step_do(rig: StepRig) -> None:
    whole = rig.run([CHUNK, *DECODES], SHAPE, 1)
    apart = small()
    with compiling_quickly():  # it rounds differently, and here all is asked up to rounding
        apart.compile_all((part, 1) for part in SHAPE.parts)
    prefill = apart.run([CHUNK], SHAPE.parts[0], 1)
    apart.page_table = apart.page_table[1:]  # the rows behind the chunk
    decode = apart.run(DECODES, SHAPE.parts[1], 1)
    for name in ("logits", "sampled", "token_logprobs"):
        expected = np.concatenate([getattr(prefill, name)[:1], getattr(decode, name)[: len(DECODES)]])
        got = getattr(whole, name)[: 1 + len(DECODES)]
        if name == "token_logprobs":  # floats travel as their bits, between ids
            expected, got = expected[:, :1].view("f4"), got[:, :1].view("f4")
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4, err_msg=name)
    changed = prefill.blocks - apart.past + (decode.blocks - apart.past)
    np.testing.assert_allclose(whole.blocks - rig.past, changed, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(whole.history[0], prefill.history[0])
    np.testing.assert_array_equal(whole.history[1:4], decode.history[:3])
