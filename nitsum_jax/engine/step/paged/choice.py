"""Whether there is a kernel for the shapes of a model."""

import dataclasses

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import AttentionForm, StepForms
from nitsum_jax.engine.step.paged.plan import make_plan
from nitsum_jax.errors import InvalidInputError


def fitting(forms: StepForms, asked: str, shape: PoolShape, *, q_heads: int, most_new_tokens: int) -> StepForms:
    """The forms of all steps of a cell: these, or with XLA's attention where they have no kernel for these shapes.

    It is one for all buckets and every TP, since they must give the same bits.

    Args:
      forms: what the platform has.
      asked: "auto", "xla" or "pallas", see `forms.step_forms`.
      shape: of the pool.
      q_heads: H/K, query heads of a virtual shard.
      most_new_tokens: of a row, in any step.

    Raises:
      InvalidInputError: "pallas" was asked for, and there is no kernel.
    """
    if forms.attention is AttentionForm.XLA:
        return forms
    reason = _lacking(forms.attention, shape, q_heads, most_new_tokens)
    if reason is None:
        return forms
    if asked == "pallas":
        raise InvalidInputError(f"attention=pallas has no kernel here: {reason}; give xla or auto")
    return dataclasses.replace(forms, attention=AttentionForm.XLA)


def _lacking(form: AttentionForm, shape: PoolShape, q_heads: int, most_new_tokens: int) -> str | None:
    if form is AttentionForm.INTERPRETED:
        return "a CPU has none, and interpreting one is for tests"
    if shape.stored_bits < 16:
        return f"kernels read a KV cache of float32 or bfloat16, not {shape.dtype}"
    # Only where it is wanted: Pallas takes half a second to import.
    from nitsum_jax.engine.step.paged.kernels import KERNELS

    of = KERNELS[str(form)]
    return of.unsupported(make_plan(shape, most_new_tokens, q_heads // shape.kv_heads, of.limits(shape), None, None))
