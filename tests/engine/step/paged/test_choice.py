"""Where a model's shapes have a kernel, and what is taken where they have none."""

import dataclasses
import pathlib

import pytest

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import AttentionForm, StepForms
from nitsum_jax.engine.step.paged.choice import fitting
from nitsum_jax.errors import InvalidInputError
from tests.engine.harness import Harness, tiny_model

LLAMA_8B = PoolShape(64, 32, 16, 1, 128, "bfloat16")  # of one of 8 virtual shards


@pytest.mark.parametrize("form", [AttentionForm.MOSAIC, AttentionForm.TRITON])
@pytest.mark.parametrize("new_tokens", [1, 128, 2048])
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_models_with_heads_of_128_have_a_kernel(form: AttentionForm, new_tokens: int, groups: int) -> None:
    shape = dataclasses.replace(LLAMA_8B, kv_heads=groups)
    forms = StepForms(attention=form)
    for asked in ("auto", "pallas"):
        assert fitting(forms, asked, shape, q_heads=4 * groups, most_new_tokens=new_tokens) is forms


@pytest.mark.parametrize(
    ("form", "changed", "q_heads", "new_tokens", "why"),
    [
        (AttentionForm.MOSAIC, {"head_dim": 64}, 4, 1, "heads are 128 wide"),
        (AttentionForm.MOSAIC, {"dtype": "int8"}, 4, 1, "not int8"),
        (AttentionForm.TRITON, {"dtype": "int8"}, 4, 1, "not int8"),
        (AttentionForm.MOSAIC, {"page_size": 4}, 4, 1, "pages have at least 8 tokens"),
        (AttentionForm.MOSAIC, {"kv_heads": 8}, 32, 16384, "do not fit the memory"),
        (AttentionForm.TRITON, {"head_dim": 512}, 4, 1, "heads are at most 256 wide"),
        (AttentionForm.TRITON, {}, 128, 1, "at most 64 query heads"),
        (AttentionForm.INTERPRETED, {}, 4, 1, "a CPU has none"),
    ],
)
def test_elsewhere_xla_attends_unless_a_kernel_was_asked_for(
    form: AttentionForm, changed: dict[str, int | str], q_heads: int, new_tokens: int, why: str
) -> None:
    shape = dataclasses.replace(LLAMA_8B, **changed)  # type: ignore[arg-type]
    forms = StepForms(attention=form)
    assert fitting(forms, "auto", shape, q_heads=q_heads, most_new_tokens=new_tokens) == StepForms()
    with pytest.raises(InvalidInputError, match=why):
        fitting(forms, "pallas", shape, q_heads=q_heads, most_new_tokens=new_tokens)


def test_xla_stays_xla() -> None:
    assert fitting(StepForms(), "xla", LLAMA_8B, q_heads=4, most_new_tokens=1) == StepForms()


def test_an_engine_on_a_cpu_refuses_to_interpret_a_kernel(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match="a CPU has none"):
        Harness(tiny_model("llama_gqa_tied", tmp_path), attention="pallas")
