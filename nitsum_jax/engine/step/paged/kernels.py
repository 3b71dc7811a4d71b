"""Attention over the paged pool as one kernel of Pallas: what `attention.paged_attention` computes, in another form."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import AttentionForm
from nitsum_jax.engine.step.paged import mosaic, triton
from nitsum_jax.engine.step.paged.plan import arrange_new, arrange_queries, make_plan, restore
from nitsum_jax.models.config import AttentionVariant

KERNELS = {"mosaic": mosaic, "triton": triton}


def by_form(form: AttentionForm) -> Callable[..., jax.Array]:
    """`paged_attention` by the kernel of a form other than XLA's."""
    interpret = form is AttentionForm.INTERPRETED
    kernel = str(AttentionForm.MOSAIC if interpret else form)
    return functools.partial(paged_attention, kernel=kernel, interpret=interpret)


# Compiled apart, and the layer is an input: one kernel serves all layers of a step that are of one kind.
@functools.partial(jax.jit, static_argnames=("shape", "variant", "kernel", "interpret"))
def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
    variant: AttentionVariant = AttentionVariant(),
    *,
    kernel: str,
    interpret: bool = False,
) -> jax.Array:
    """Attends T new tokens per row to the row's context in the pool and, causally, to themselves.

    The pool is read where it lies.  A row's result is a sum in one order that its own context decides, and no tile
    depends on how many rows or virtual shards there are: neither batch mates nor TP change its bits.

    Args:
      q: f32[B, T, S, H/K, A], one device's S virtual shards.
      k: f32[B, T, S, G/K, A] of the new tokens, see `attention.contained`.
      v: as k.
      pool: `[N, L, 2, W, G/K, A]` in storage type, or in bfloat16 itself.
      layer: which layer of the pool.
      page_table: i32[B, S, P], blocks of each row and shard in order; any valid block behind the context.
      context: i32[B], tokens in the pool per row.
      shape: the pool's shape.
      variant: what a token sees, and how its scores are made.
      kernel: which one of KERNELS.
      interpret: it is interpreted, on whatever device; slow, for tests.

    Returns:
      f32[B, T, S, H/K, A].  Products take their operands in the type of the pool: of a bfloat16 pool, queries and
      weights are rounded to bfloat16 as well.
    """
    of = KERNELS[kernel]
    plan = make_plan(shape, q.shape[1], q.shape[3] // shape.kv_heads, of.limits(shape), variant)
    out: jax.Array = of.attend(
        arrange_queries(q, plan),
        arrange_new(k, plan),
        arrange_new(v, plan),
        pool,
        jnp.asarray(layer, jnp.int32).reshape(1),
        page_table.reshape(-1, page_table.shape[2]),
        jnp.repeat(context, q.shape[2]),
        plan,
        interpret=interpret,
    )
    return restore(out, plan, q.shape[0])
