"""Attention over the paged pool as one kernel of Pallas: what `attention.paged_attention` computes, in another form."""

import functools

import jax
import jax.numpy as jnp

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.attention import paged_attention as xla_attention
from nitsum_jax.engine.step.paged.choice import module_of, plan_for
from nitsum_jax.engine.step.paged.form import AttentionForm
from nitsum_jax.engine.step.paged.plan import arrange_new, arrange_queries, restore


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: int,
    page_table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
    form: AttentionForm,
) -> jax.Array:
    """`attention.paged_attention` in the form given."""
    if form.kernel == "xla":
        return xla_attention(q, k, v, pool, layer, page_table, context, shape)
    number = jnp.asarray([layer], jnp.int32)
    return kernel_attention(q, k, v, pool, number, page_table, context, shape, form)


# Compiled apart, and the layer is an input: one kernel serves all layers of a step.
@functools.partial(jax.jit, static_argnames=("shape", "form", "window", "soft_cap"))
def kernel_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
    form: AttentionForm,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    """Attends T new tokens per row to the row's context in the pool and, causally, to themselves.

    The pool is read where it lies.  A row's result is a sum in one order that its own context decides, and no tile
    depends on how many rows or virtual shards there are: neither batch mates nor TP change its bits.

    Args:
      q: f32[B, T, S, H/K, A], one device's S virtual shards.
      k: f32[B, T, S, G/K, A] of the new tokens, see `attention.contained`.
      v: as k.
      pool: `[N, L, 2, W, G/K, A]` in storage type, or in bfloat16 itself.
      layer: i32[1], which layer of the pool.
      page_table: i32[B, S, P], blocks of each row and shard in order; any valid block behind the context.
      context: i32[B], tokens in the pool per row.
      shape: the pool's shape.
      form: which kernel.
      window: a token sees so many tokens, itself among them; None: all before it.
      soft_cap: scores s become c tanh(s / c); None: they stay.

    Returns:
      f32[B, T, S, H/K, A].  Products take their operands in the type of the pool: of a bfloat16 pool, queries and
      weights are rounded to bfloat16 as well.
    """
    plan = plan_for(form.kernel, shape, q.shape[3], q.shape[1], window, soft_cap)
    out: jax.Array = module_of(form.kernel).attend(
        arrange_queries(q, plan),
        arrange_new(k, plan),
        arrange_new(v, plan),
        pool,
        layer,
        page_table.reshape(-1, page_table.shape[2]),
        jnp.repeat(context, q.shape[2]),
        plan,
        interpret=form.interpret,
    )
    return restore(out, plan, q.shape[0])
