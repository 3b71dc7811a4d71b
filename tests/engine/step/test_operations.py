"""How many operations XLA:CPU makes of a layer: each costs time at run time, and more when it is compiled."""

import dataclasses

import jax
import pytest

from nitsum_jax.bench.compile.operations import OperationCounts, operations
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.engine.step.program import compile_step
from nitsum_jax.models.cuts import ModelCut
from tests.engine.rig import StepRig


def operations_of_decoding(layers: int) -> OperationCounts:
    """Of a decode step of one row, one virtual shard and so many layers; machine code is left plain."""
    rig = StepRig("llama_gqa_tied", "bfloat16", vshards=1, batch=1, max_model_len=128)
    config = dataclasses.replace(rig.program.config, num_layers=layers)
    program = dataclasses.replace(
        rig.program,
        config=config,
        cut=ModelCut.of(config, 1),
        pool=dataclasses.replace(rig.program.pool, layers=layers),
    )
    lower = jax.stages.Lowered.compile
    with pytest.MonkeyPatch.context() as patch:
        options = {"xla_backend_optimization_level": "0"}
        patch.setattr(jax.stages.Lowered, "compile", lambda self, given=None: lower(self, {**(given or {}), **options}))
        return operations(compile_step(program, StepShape(1, 1), rig.mesh(1)).as_text() or "")


def test_a_layer_is_few_operations() -> None:
    shallow, deep = operations_of_decoding(1), operations_of_decoding(3)
    assert (deep.total - shallow.total) / 2 <= 36
    assert (deep.fusions - shallow.fusions) / 2 <= 29
    assert deep.looped.get("reduce-window", 0) == 0


def test_only_what_runs_is_counted() -> None:
    text = """HloModule example

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4] get-tuple-element(%p), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%body
  %y = f32[4] copy(%x)
  ROOT %t = (s32[], f32[4]) tuple(%next, %y)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4] parameter(0)
  %b = f32[4] fusion(%a), kind=kLoop, calls=%body
  %s = (s32[], f32[4]) tuple(%a, %b)
  %w = (s32[], f32[4]) while(%s), condition=%body, body=%body
  ROOT %r = f32[4] get-tuple-element(%w), index=1
}
"""
    found = operations(text)
    assert found.straight == {"fusion": 1, "while": 1}
    assert found.looped == {"fusion": 1, "copy": 1}
    assert (found.total, found.fusions) == (4, 2)
