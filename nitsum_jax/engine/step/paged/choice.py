"""Which form the attention of a cell's steps has: one for all, since they must give the same bits at every TP."""

from types import ModuleType

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged.form import AttentionForm
from nitsum_jax.engine.step.paged.plan import Plan, make_plan
from nitsum_jax.errors import InvalidInputError


def attention_form(asked: str, platform: str, shape: PoolShape, *, q_heads: int, most_new_tokens: int) -> AttentionForm:
    """The form for a platform ("cpu", "gpu" or "tpu").

    Args:
      asked: one of ATTENTIONS.
      platform: of the devices.
      shape: of the pool.
      q_heads: H/K, query heads of a virtual shard.
      most_new_tokens: of a row, in any step.

    Raises:
      InvalidInputError: "pallas" was asked for, and there is no kernel for this platform or these shapes.
    """
    if asked == "xla":
        return AttentionForm()
    kernel = {"tpu": "mosaic", "gpu": "triton", "cuda": "triton"}.get(platform)
    if kernel is None:
        reason: str | None = f"there is none for a {platform.upper()}"
    else:
        reason = module_of(kernel).unsupported(plan_for(kernel, shape, q_heads, most_new_tokens))
    if kernel is None or reason is not None:
        if asked == "pallas":
            raise InvalidInputError(f"attention=pallas has no kernel here: {reason}; give xla or auto")
        return AttentionForm()
    return AttentionForm(kernel)


def plan_for(
    kernel: str,
    shape: PoolShape,
    q_heads: int,
    length: int,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Plan:
    """How a kernel cuts an attention with so many query heads of a virtual shard and new tokens of a row."""
    limits = module_of(kernel).limits(shape)
    return make_plan(shape, length, q_heads // shape.kv_heads, limits, window, soft_cap)


def module_of(kernel: str) -> ModuleType:
    """Where a kernel is; imported when it is wanted, because Pallas takes half a second, which a CPU need not wait."""
    if kernel == "mosaic":
        from nitsum_jax.engine.step.paged import mosaic

        return mosaic
    from nitsum_jax.engine.step.paged import triton

    return triton
