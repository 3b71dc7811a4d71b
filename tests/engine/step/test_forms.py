"""Forms of a step by platform: the same numbers in every form, the same bits at every TP in each, a name for each."""

import dataclasses
import itertools
import pathlib

import jax
import numpy as np
import pytest

from nitsum_jax.engine.executables.step_store import StepStore
from nitsum_jax.engine.step.forms import AttentionForm, StepForms, check_kv_dtype, step_forms
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import Program
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.layers.matmul import MatmulChoice
from nitsum_jax.models.layers.quantised import QuantisedForm
from tests.engine.quick import compiling_quickly
from tests.engine.rig import Row, StepRig

ROWS = [Row(context, (token,), logprobs=True) for context, token in ((3, 9), (40, 8), (130, 7))]
PROMPT = [Row(20, tuple(range(3, 15)))]


def test_a_tpu_refuses_a_cache_that_it_would_copy() -> None:
    for platform, kv_dtype in (("cpu", "int8"), ("gpu", "int8"), ("tpu", "float8_e4m3"), ("tpu", "bfloat16")):
        check_kv_dtype(platform, kv_dtype)
    with pytest.raises(InvalidInputError, match="give float8_e4m3"):
        check_kv_dtype("tpu", "int8")


def test_a_cpu_keeps_the_forms_that_its_bits_were_promised_with() -> None:
    # How quantised weights are multiplied is no part of a step without any.
    whole = StepForms(matmul=MatmulChoice(quantised=QuantisedForm.INTEGER, widened="float32"))
    assert step_forms("cpu", "float32") == step_forms("cpu", "float32", "xla") == whole
    assert step_forms("cpu", "bfloat16").pool == StepForms().pool


@pytest.mark.parametrize(
    ("platform", "kernel"),
    [("tpu", AttentionForm.MOSAIC), ("gpu", AttentionForm.TRITON), ("cpu", AttentionForm.INTERPRETED)],
)
def test_the_flag_chooses_what_attends(platform: str, kernel: AttentionForm) -> None:
    assert step_forms(platform, "bfloat16", "xla").attention is AttentionForm.XLA
    assert step_forms(platform, "bfloat16", "pallas").attention is kernel
    expected = AttentionForm.XLA if platform == "cpu" else kernel
    assert step_forms(platform, "bfloat16", "auto").attention is expected


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_forms_of_accelerators_give_the_numbers_of_the_cpu(platform: str) -> None:
    """On a CPU, which runs them, if slowly."""
    plain = StepRig("llama_gqa_tied", "bfloat16", vshards=4, batch=4, max_model_len=256)
    forms = step_forms(platform, "bfloat16", "xla")
    other = StepRig(
        "llama_gqa_tied",
        "bfloat16",
        vshards=4,
        batch=4,
        max_model_len=256,
        forms=dataclasses.replace(forms, compile_options=()),
    )
    assert other.past.dtype == other.program.pool.storage_dtype
    shapes = (StepShape(4, 1), StepShape(1, 16))
    with compiling_quickly():  # it rounds differently, and here all is asked up to rounding
        for one in (plain, other):
            one.compile_all((shape, 2) for shape in shapes)
    for rows, shape in zip((ROWS, PROMPT), shapes, strict=True):
        expected, actual = plain.run(rows, shape, 2), other.run(rows, shape, 2)
        count = len(rows)
        np.testing.assert_allclose(actual.logits[:count], expected.logits[:count], rtol=0, atol=2e-2)
        blocks = actual.blocks.view(np.uint16).astype(np.uint32) << 16
        np.testing.assert_allclose(
            blocks.view(np.float32), (expected.blocks.astype(np.uint32) << 16).view(np.float32), rtol=0, atol=5e-2
        )


def test_each_form_is_kept_on_disk_for_itself(tmp_path: pathlib.Path) -> None:
    store = StepStore(tmp_path)
    rig = StepRig("llama_gqa_tied", "bfloat16", vshards=4, batch=4, max_model_len=128)
    programs: list[Program] = [rig.program, dataclasses.replace(rig.program, fast_sums=True)]
    for platform, attention in itertools.product(("cpu", "gpu", "tpu"), ("xla", "pallas")):
        forms = step_forms(platform, "bfloat16", attention)
        programs.append(
            dataclasses.replace(
                rig.program,
                pool=dataclasses.replace(rig.program.pool, form=forms.pool),
                forms=forms,
            )
        )
    paths = {store._path(program, StepShape(4, 1), jax.devices()[0], 1) for program in programs}
    assert len(paths) == len(programs) - 1  # that of the CPU with XLA is the first
