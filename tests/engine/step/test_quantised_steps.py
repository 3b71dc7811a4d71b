"""Steps with weights in 8 and 4 bits: every degree of tensor parallelism gives the same bits, and the right numbers.

Each matrix of the model is in another format (see `quantised_model`), so few compilations ask about all of them.
"""

import dataclasses

import numpy as np
import pytest

from nitsum_jax.engine.step.forms import StepForms, step_forms
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.models.checkpoint.blocks import INT8, QuantFormat
from nitsum_jax.models.layers.quantised import QuantisedForm
from tests.engine.quick import compiling_quickly
from tests.engine.rig import Row, StepRig
from tests.models.checkpoint.quantised_model import quantised_model

_DECODE = StepShape(2, 1)
_ROWS = [Row(40, (5,)), Row(7, (77,))]
_INTEGER, _WIDENED = QuantisedForm.INTEGER, QuantisedForm.WIDENED


def _forms(form: QuantisedForm) -> StepForms:
    forms = step_forms("cpu", "float32")
    return dataclasses.replace(forms, matmul=dataclasses.replace(forms.matmul, quantised=form))


def _rig(form: QuantisedForm, quantization: str = "auto", vshards: int = 8) -> StepRig:
    model = quantised_model(vshards, quantization)
    return StepRig("", "float32", vshards=vshards, batch=2, max_model_len=64, forms=_forms(form), model=model)


def test_the_model_of_these_tests_has_every_kind_of_format() -> None:
    formats = dict(quantised_model(8).formats)
    assert formats == {
        "embed.table": QuantFormat(8, 32, False, "float16"),
        "layers.0.attn.qkv": QuantFormat(4, 32, True, "float16"),
        "layers.0.attn.out": QuantFormat(4, 32, False, "float16"),
        "layers.0.mlp.gate_up": QuantFormat(4, 32, True, "float16"),
        "layers.0.mlp.down": QuantFormat(8, 16, False, "float32"),
        "head.table": INT8,
    }


@pytest.mark.parametrize(("form", "tps"), [(_INTEGER, (1, 2, 4, 8)), (_WIDENED, (1, 8))])
def test_every_degree_of_parallelism_gives_the_same_bits(form: QuantisedForm, tps: tuple[int, ...]) -> None:
    rig = _rig(form)
    rig.compile_all((_DECODE, tp) for tp in tps)
    expected = rig.run(_ROWS, _DECODE, 1)
    assert expected.logits[:2, :96].std() > 0.5  # there is something to differ
    for tp in tps[1:]:
        actual = rig.run(_ROWS, _DECODE, tp)
        np.testing.assert_array_equal(actual.logits, expected.logits, err_msg=f"TP {tp}")
        np.testing.assert_array_equal(actual.sampled, expected.sampled, err_msg=f"TP {tp}")
        np.testing.assert_array_equal(actual.blocks, expected.blocks, err_msg=f"TP {tp}")


@pytest.mark.parametrize(("form", "tolerance"), [(_INTEGER, 0.1), (_WIDENED, 1e-4)])
def test_the_numbers_are_those_of_the_widened_weights(form: QuantisedForm, tolerance: float) -> None:
    with compiling_quickly():  # it rounds differently, and here all is asked up to rounding
        expected = _rig(form, "none", 1).run(_ROWS, _DECODE, 1)
        actual = _rig(form, "auto", 1).run(_ROWS, _DECODE, 1)
    differs = np.abs(actual.logits[:2, :96] - expected.logits[:2, :96])
    assert differs.max() < tolerance * expected.logits[:2, :96].std()
