"""`paged_attention` as one kernel of Pallas."""

import functools

import jax
import jax.numpy as jnp

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.paged import mosaic, triton
from nitsum_jax.engine.step.paged.plan import arrange_new, arrange_queries, make_plan, restore

KERNELS = {"mosaic": mosaic, "triton": triton}


@functools.partial(jax.jit, static_argnames=("shape", "kernel", "interpret", "window", "soft_cap"))
def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    context: jax.Array,
    shape: PoolShape,
    *,
    kernel: str,
    interpret: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
) -> jax.Array:
    slots = q.shape[2]
    of = KERNELS[kernel]
    plan = make_plan(shape, q.shape[1], q.shape[3] // shape.kv_heads, of.LIMITS, window, soft_cap)
    out = of.attend(
        arrange_queries(q, plan),
        arrange_new(k, plan),
        arrange_new(v, plan),
        pool,
        jnp.asarray(layer, jnp.int32).reshape(1),
        page_table.reshape(-1, page_table.shape[2]),
        jnp.repeat(context, slots),
        plan,
        interpret=interpret,
    )
    return restore(out, plan, q.shape[0])
