"""A cycle of switches in the middle of a text changes no bit of its likelihood, and a block that went astray does."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.engine.harness import Harness, tiny_model
from tests.engine.switching.likelihood import likelihoods

# All degrees of parallelism and back; each pair of devices gives and takes blocks.
WALK = ("tp2x2", "tp4", "tp2+tp1x2", "tp1x4")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """As users compile it: the engine of test_switching.py, whose compiled steps it shares."""
    with Harness(tiny_model("llama_odd", tmp_path_factory.mktemp("model")), deterministic=True) as harness:
        harness.engine.wait_for_layouts()
        yield harness


def test_a_cycle_of_switches_changes_no_bit_of_the_likelihood(harness: Harness) -> None:
    before = likelihoods(harness)
    assert before.std() > 0.1  # there is something to differ
    assert before.max() < -0.01  # and nobody made the tokens likely that are forced
    assert np.array_equal(likelihoods(harness, WALK), before)
    assert np.array_equal(likelihoods(harness, WALK, every=3), before)


def test_one_block_that_went_astray_shows(harness: Harness) -> None:
    whole, broken = likelihoods(harness, WALK), likelihoods(harness, WALK, corrupt_at=60)
    assert np.array_equal(broken[1:], whole[1:])
    first = np.flatnonzero(broken[0] != whole[0])[0]
    assert 60 <= first <= 63  # one step is in flight, one more was read
    assert np.abs(broken[0] - whole[0])[first:].max() > 1e-3
