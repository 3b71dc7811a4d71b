"""A kernel that computes something else does not serve."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import AttentionForm, StepForms
from nitsum_jax.engine.step.paged import kernels
from nitsum_jax.engine.step.paged.check import checked, find_fault
from nitsum_jax.errors import PreconditionError

POOL = PoolShape(1, 3, 16, 1, 64, "float32")
INTERPRETED = AttentionForm.INTERPRETED
FORMS = StepForms(attention=INTERPRETED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_kernel_has_no_fault(dtype: str) -> None:
    shape = PoolShape(1, 3, 16, 1, 64, dtype)
    assert find_fault(INTERPRETED, shape, q_heads=2, device=jax.devices()[0]) is None


def test_a_kernel_with_wrong_numbers_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forgetful(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return jnp.broadcast_to(v[:, :, :, :1], q.shape)  # what a token sees of itself, and nothing of the pool

    monkeypatch.setattr(kernels, "paged_attention", forgetful)
    device = jax.devices()[0]
    assert checked(FORMS, "auto", POOL, q_heads=2, device=device) == StepForms()
    assert "attention by XLA instead of the interpreted kernel" in caplog.text
    with pytest.raises(
        PreconditionError, match=r"attention=pallas cannot be used on .*: it is off by .* give xla or auto"
    ):
        checked(FORMS, "pallas", POOL, q_heads=2, device=device)


def test_a_kernel_that_does_not_compile_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> jax.Array:
        raise NotImplementedError("no such\ninstruction")

    monkeypatch.setattr(kernels, "paged_attention", refused)
    fault = find_fault(INTERPRETED, POOL, q_heads=2, device=jax.devices()[0])
    assert fault == "NotImplementedError: no such instruction"


def test_the_attention_of_xla_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(kernels, "paged_attention")
    assert checked(StepForms(), "xla", POOL, q_heads=2, device=jax.devices()[0]) == StepForms()
