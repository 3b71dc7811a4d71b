"""A whole step whose attention is a kernel, interpreted: the logits of XLA's, and the same bits at every TP."""

import dataclasses

import numpy as np
import pytest

from nitsum_jax.engine.step.forms import AttentionForm
from nitsum_jax.engine.step.packing import StepShape
from tests.engine.quick import greedy_steps  # noqa: F401
from tests.engine.rig import Row, StepRig

pytestmark = pytest.mark.usefixtures("greedy_steps")

CONTEXTS = (3, 40, 130)


@pytest.mark.parametrize(
    ("dtype", "shape", "others"), [("bfloat16", StepShape(4, 1), (2, 4, 8)), ("float32", StepShape(1, 16), (8,))]
)
def test_every_degree_of_parallelism_gives_the_same_bits(dtype: str, shape: StepShape, others: tuple[int, ...]) -> None:
    rig = StepRig("llama_gqa_tied", dtype, batch=4, max_model_len=160)
    rows = [Row(130, tuple(range(3, 15)))]
    if shape.is_decode:
        rows = [Row(context, (7 * index + 3,)) for index, context in enumerate(CONTEXTS)]
    by_xla = rig.run(rows, shape, 1)
    rig.program = dataclasses.replace(
        rig.program, forms=dataclasses.replace(rig.program.forms, attention=AttentionForm.INTERPRETED)
    )
    rig.compiled.cache_clear()
    rig.compile_all((shape, tp) for tp in (1, *others))
    first = rig.run(rows, shape, 1)
    used = slice(len(rows))
    assert not np.array_equal(first.logits[used], by_xla.logits[used])  # it is the kernel
    atol = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(first.logits[used], by_xla.logits[used], rtol=0, atol=atol)
    for tp in others:
        outcome = rig.run(rows, shape, tp)
        for name in ("logits", "blocks", "sampled"):
            got, expected = getattr(outcome, name), getattr(first, name)
            assert np.array_equal(got.view(f"u{got.dtype.itemsize}"), expected.view(f"u{got.dtype.itemsize}")), (
                f"{name} at TP {tp}"
            )
