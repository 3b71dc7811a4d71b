"""The step that one process and two processes compute alike."""

import dataclasses

from nitsum_jax.engine.step.attention import PoolShape
from nitsum_jax.engine.step.forms import step_forms
from nitsum_jax.engine.step.program import Program
from tests.engine.reference import tiny_params
from tests.engine.rig import PAGE_SIZE

VARIANT, DTYPE = "llama_odd", "float32"
TP, VSHARDS, BATCH, MAX_LEN = 4, 4, 4, 64


def program() -> Program:
    """As `StepRig` makes it, without weights on devices."""
    cut, _ = tiny_params(VARIANT, VSHARDS, DTYPE)
    config, forms = cut.config, step_forms("cpu", DTYPE)
    one = PoolShape(1, config.num_layers, PAGE_SIZE, cut.kv_heads, config.head_dim, DTYPE, forms.pool)
    pool = dataclasses.replace(one, blocks=BATCH * VSHARDS * one.pages(MAX_LEN) + 1)
    return Program(config, cut, DTYPE, pool, BATCH, MAX_LEN, forms)
