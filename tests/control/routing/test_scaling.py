"""How many cells there should be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.routing.scaling import CellPressure, cells_wanted, pressure_of
from nitsum_jax.control.scheduling.forecast import TierForecast
from nitsum_jax.control.tiers import Tier, TierSet

TIERS = TierSet((Tier("chat", 500, 50), Tier("batch", 60_000, 1_000)))


def test_pressure_is_the_largest_share_of_a_target() -> None:
    chat, batch = TierForecast("chat", 0.4, 0.02, wait_s=0.2), TierForecast("batch", 1.0, 0.02, wait_s=0.5)
    assert pressure_of(TIERS, (chat, batch), (True, False)) == CellPressure(0.8, 0.5)
    assert pressure_of(TIERS, (TierForecast("chat", 0.1, 0.06, wait_s=0.01),), ()).pressure == pytest.approx(1.2)


def test_slow_motion_is_no_pressure() -> None:
    """A paced cell reports in seconds of this machine, of which targets have as many more."""
    chat = TierForecast("chat", 0.4, 0.02, wait_s=0.2)
    assert pressure_of(TIERS, (chat.scaled(24.0),), (), 24.0).pressure == pytest.approx(0.8)


def test_an_idle_cell_that_is_too_slow_needs_no_other() -> None:
    assert pressure_of(TIERS, (TierForecast("chat", 3.0, 0.2),), ()) == CellPressure(0.0, 1.0)
    assert pressure_of(TIERS, (TierForecast("chat", math.inf, math.inf, math.inf),), ()).pressure == 0


@pytest.mark.parametrize(
    ("now", "pressures", "wanted"),
    [
        (2, [], 2),  # nobody has said anything yet
        (1, [(0.9, 1.0)], 2),
        (2, [(0.6, 0.8), (0.6, 0.9)], 3),  # targets are missed
        (2, [(0.2, 0.5), (0.2, 0.5)], 2),  # they are, but not for want of cells
        (3, [(0.3, 1.0)] * 3, 2),
        (3, [(0.4, 1.0)] * 3, 3),  # two would have 0.6
        (4, [(5.0, 0.1)] * 4, 6),  # all the way at once, as far as it goes
        (1, [(0.0, 1.0)], 1),
        (6, [(0.9, 1.0)] * 6, 6),
    ],
)
def test_cells_are_added_and_taken_away(now: int, pressures: list[tuple[float, float]], wanted: int) -> None:
    assert cells_wanted(now, [CellPressure(*one) for one in pressures], 1, 6) == wanted


@given(
    st.integers(1, 20),
    st.lists(st.builds(CellPressure, st.floats(0, 10), st.floats(0, 1)), max_size=20),
    st.integers(1, 5),
    st.integers(5, 20),
)
def test_the_bounds_hold(now: int, pressures: list[CellPressure], least: int, most: int) -> None:
    assert least <= cells_wanted(now, pressures, least, most) <= most
