"""Far into overload adaptive control meets about as many targets as the best static layout."""

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.profiles import load_profile
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.policies.named import policies_named
from nitsum_jax.sim.policies.search import run
from nitsum_jax.sim.study.loads import Part, steady
from nitsum_jax.sim.study.sources import open_traces

SETTING = Setting(
    CostModel(load_profile("llama-3.1-8b-h100")), TierSet((Tier("chat", 300, 6), Tier("code", 5000, 100))), 8
)
LAYOUTS = ("tp4x2", "tp4/chat+tp1x4/code", "tp4/chat+tp2+tp1x2")


@pytest.mark.parametrize("rate", [250.0, 500.0])
def test_adaptive_control_is_not_below_static_layouts(rate: float) -> None:
    """Two and four times what the cell serves; in the first two of ten seconds nothing is known of the load."""
    traces, _ = open_traces(None, 0)
    parts = [Part("conv", "chat", 0.7 * rate), Part("code", "code", 0.3 * rate)]
    workload = steady("overload", traces, parts, 10.0).at(1.0)
    static = {layout: run(SETTING, workload, policies_named(SETTING, layout)[0]).goodput for layout in LAYOUTS}
    adaptive = run(SETTING, workload, policies_named(SETTING, "adaptive")[0]).goodput
    assert adaptive >= 0.95 * max(static.values()), (adaptive, static)
