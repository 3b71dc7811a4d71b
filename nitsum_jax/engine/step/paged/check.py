"""A kernel is tried on the device before it serves: its numbers must be those of the attention in XLA.

Kernels are tested interpreted on a CPU and compiled for accelerators that are not there (`tests/accelerator`).  What
a device makes of them only the device can show, and wrong numbers would be fluent text that the model did not mean.
"""

import dataclasses
import logging
from collections.abc import Collection

import jax
import numpy as np

from nitsum_jax.engine.step.attention import PoolShape, encode, paged_attention
from nitsum_jax.engine.step.forms import AttentionForm, StepForms
from nitsum_jax.errors import PreconditionError, one_line
from nitsum_jax.models.config import AttentionVariant

_LOG = logging.getLogger(__name__)
# The largest difference that rounding explains, for numbers of size 1: of a bfloat16 pool, a kernel rounds queries and
# weights as well, and an accelerator may multiply float32 by parts.
_TOLERANCE = {"float32": 1e-2, "bfloat16": 5e-2}
_CONTEXTS = (0, 1, 37, 300)
_NEW_TOKENS = (1, 16)


def checked(
    forms: StepForms,
    asked: str,
    shape: PoolShape,
    *,
    q_heads: int,
    device: jax.Device,
    variants: Collection[AttentionVariant] = (AttentionVariant(),),
) -> StepForms:
    """The forms that serve: these, or with XLA's attention if their kernel fails on this device.

    Args:
      forms: as `choice.fitting` has chosen.
      asked: "auto", "xla" or "pallas", see `forms.step_forms`.
      shape: of the pool; a small one of its kind is made.
      q_heads: H/K, query heads of a virtual shard.
      device: that the kernel is tried on.
      variants: of attention that the model's layers have.

    Raises:
      PreconditionError: "pallas" was asked for, and the kernel fails.
    """
    if forms.attention is AttentionForm.XLA:
        return forms
    faults = (
        find_fault(forms.attention, shape, q_heads=q_heads, device=device, variant=variant) for variant in variants
    )
    fault = next(filter(None, faults), None)
    if fault is None:
        return forms
    if asked == "pallas":
        raise PreconditionError(f"attention=pallas cannot be used on {device}: {fault}; give xla or auto")
    _LOG.warning("attention by XLA instead of the %s kernel, which fails on %s: %s", forms.attention, device, fault)
    return dataclasses.replace(forms, attention=AttentionForm.XLA)


def find_fault(
    form: AttentionForm,
    shape: PoolShape,
    *,
    q_heads: int,
    device: jax.Device,
    variant: AttentionVariant = AttentionVariant(),
) -> str | None:
    """What is wrong with a kernel on a device, in words; None: it agrees with XLA's attention on random numbers."""
    # Only where it is wanted: Pallas takes half a second to import.
    from nitsum_jax.engine.step.paged.kernels import by_form

    kernel = by_form(form)
    pages = shape.pages(max(_CONTEXTS))
    small = dataclasses.replace(shape, layers=2, blocks=len(_CONTEXTS) * pages + 1)
    for tokens in _NEW_TOKENS:
        arguments = [jax.device_put(one, device) for one in _random(small, pages, tokens, q_heads)]
        q, k, v, pool, page_table, context = arguments
        pool = encode(pool, small)
        try:
            got = np.asarray(kernel(q, k, v, pool, 1, page_table, context, small, variant))
        except Exception as error:  # a compiler's or a driver's, of whatever type
            return one_line(f"{type(error).__name__}: {error}")
        expected = np.asarray(
            jax.jit(paged_attention, static_argnums=(4, 7, 8))(q, k, v, pool, 1, page_table, context, small, variant)
        )
        worst = float(np.abs(got - expected).max())
        if not worst <= _TOLERANCE[shape.dtype]:  # NaN, too
            return f"it is off by {worst:.3g} for {tokens} new tokens a row"
    return None


def _random(shape: PoolShape, pages: int, tokens: int, q_heads: int) -> tuple[np.ndarray, ...]:
    """Queries, new keys and values, a pool in float32, its block table and contexts; a virtual shard for each row."""
    rng = np.random.default_rng(tokens)
    batch = len(_CONTEXTS)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size).astype(np.float32)

    q = normal(batch, tokens, 1, q_heads, shape.head_dim)
    k = normal(batch, tokens, 1, shape.kv_heads, shape.head_dim)
    v = normal(batch, tokens, 1, shape.kv_heads, shape.head_dim)
    pool = normal(shape.blocks, *shape.block_shape)
    page_table = rng.permutation(shape.blocks)[: batch * pages].reshape(batch, 1, pages).astype(np.int32)
    return q, k, v, pool, page_table, np.asarray(_CONTEXTS, np.int32)
