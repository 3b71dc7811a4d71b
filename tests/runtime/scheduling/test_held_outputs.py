"""Outputs that hold a form keep their turn: while they wait for masks, prompts do not go before them once more."""

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.engine.batching.waiting import FifoPolicy
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.policy import Policy
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.runtime.scheduling.tiered import TieredScheduling
from tests.control.profiles import roofline_profile
from tests.runtime.fake_cell import FakeCell

COST = CostModel(roofline_profile(mixed_steps=False))
TIERS = TierSet((Tier("tight", 500, 3), Tier("relaxed", 10_000, 200)))
FORM: Any = types.SimpleNamespace(first_mask=np.zeros(1, np.int32), matcher=object)


def fifo(clock: Callable[[], float]) -> Policy:
    return FifoPolicy(100)


def tiered(clock: Callable[[], float]) -> Policy:
    return TieredScheduling(TIERS, COST, 100, clock=clock)


def steps(policy_of: Callable[[Callable[[], float]], Policy], form: Any) -> str:
    """Steps in their order while two outputs are made beside long prompts: C for a chunk, D for decoding."""
    cell = FakeCell(policy_of, COST, "tp8", 40_000)
    order: list[str] = []
    policy: Any = cell.policy
    launched = policy.launched

    def note(instance: Instance, step: Step, now_s: float) -> None:
        if {"0", "1"} & cell.alive and any(s.generated for s in instance.rows.values()):
            order.append("D" if step.chunk is None else "C")
        launched(instance, step, now_s)

    policy.launched = note
    for _ in range(2):
        cell.add(0.0, 20, 40, "tight", form)
    for _ in range(4):
        cell.add(0.001, 3900, 1, "relaxed")
    cell.run()
    return "".join(order)


@pytest.mark.parametrize("policy_of", [fifo, tiered])
def test_beside_prompts_held_outputs_get_their_tokens_as_often_as_free_ones(
    policy_of: Callable[[Callable[[], float]], Policy],
) -> None:
    free, held = (steps(policy_of, form).rstrip("D") for form in (None, FORM))
    assert "CC" not in free
    assert "CC" not in held
    assert (held.count("D"), held.count("C")) == (free.count("D"), free.count("C"))
