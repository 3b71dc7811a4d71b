"""The one order of addition: whatever the number of ranks, the bits are those of one balanced tree over all vshards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nitsum_jax.meshes.mesh import TP_AXIS
from nitsum_jax.models.layers.reduction import GATHER_LIMIT_BYTES, Ranks, tree_sum

K = 8
TPS = (1, 2, 4, 8)
# Partial results of a step, [B, T, D]: fetched whole by every rank; split among the ranks because they are large;
# large, but with a number of rows that ranks cannot share.
SHAPES = {"small": (4, 1, 48), "large": (2, 32, 8192), "large_indivisible": (3, 1, 131072)}


def partials(shape: tuple[int, ...]) -> np.ndarray:
    """f32[K, B, T, D] over many magnitudes, so that another order of addition would show."""
    rng = np.random.default_rng(0)
    scales = np.float32(10.0) ** rng.integers(-3, 4, (K, *shape)).astype(np.float32)
    return rng.standard_normal((K, *shape)).astype(np.float32) * scales


def numpy_tree(parts: np.ndarray) -> np.ndarray:
    while len(parts) > 1:
        parts = parts[::2] + parts[1::2]
    return parts[0]


def summed(
    parts: np.ndarray, tp: int, *, fast: bool = False, limit: int = GATHER_LIMIT_BYTES
) -> tuple[np.ndarray, str]:
    """What every rank gets, `[tp, B, T, D]`, and the program's text."""
    ranks = Ranks(tp, fast=fast, gather_limit_bytes=limit)

    def step(mine: jax.Array) -> jax.Array:
        return ranks.sum([mine[slot] for slot in range(K // tp)])[None]

    mesh = Mesh(np.array(jax.devices()[:tp]), (TP_AXIS,))
    mapped = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(TP_AXIS), out_specs=P(TP_AXIS), check_vma=False))
    return np.asarray(mapped(parts)), mapped.lower(parts).as_text()


@pytest.mark.parametrize("name", SHAPES)
def test_every_degree_and_rank_gets_the_bits_of_the_tree(name: str) -> None:
    parts = partials(SHAPES[name])
    expected = numpy_tree(parts)
    # The test sees the order: adding one after the other rounds differently.
    assert not np.array_equal(expected, np.add.reduce(parts))
    for tp in TPS:
        result, text = summed(parts, tp)
        for rank in range(tp):
            np.testing.assert_array_equal(result[rank], expected)
        assert ("all_to_all" in text) == (tp > 1 and name == "large")


def test_the_limit_for_fetching_whole_partials_changes_no_bit() -> None:
    parts = partials((8, 1, 48))
    expected = numpy_tree(parts)
    for tp in TPS[1:]:
        result, text = summed(parts, tp, limit=1024)
        assert "all_to_all" in text
        for rank in range(tp):
            np.testing.assert_array_equal(result[rank], expected)


@pytest.mark.parametrize("name", SHAPES)
def test_a_fast_sum_is_a_sum_in_bfloat16_by_one_message(name: str) -> None:
    parts = np.random.default_rng(0).standard_normal((K, *SHAPES[name])).astype(np.float32)
    exact = parts.astype(np.float64).sum(axis=0)
    for tp in TPS[1:]:
        result, text = summed(parts, tp, fast=True)
        for rank in range(1, tp):
            np.testing.assert_array_equal(result[rank], result[0])
        np.testing.assert_allclose(result[0], exact, atol=tp * 2.0**-8 * np.abs(parts).sum(axis=0).max())
        assert (text.count("all_reduce"), text.count("all_gather"), text.count("all_to_all")) == (1, 0, 0)
        assert not np.array_equal(result[0], numpy_tree(parts))
    np.testing.assert_array_equal(summed(parts, 1, fast=True)[0][0], numpy_tree(parts))  # nothing to exchange


def test_a_large_part_is_one_above_the_limit() -> None:
    sizes = {name: 4 * np.prod(shape) for name, shape in SHAPES.items()}
    assert sizes["small"] <= GATHER_LIMIT_BYTES < min(sizes["large"], sizes["large_indivisible"])


def test_tree_sum_adds_neighbours_first() -> None:
    # In float32 1e8 + 1 is 1e8: only (1e8 - 1e8) + (1 + 1) gives 2.
    parts = [jnp.full((1,), value, jnp.float32) for value in (1e8, -1e8, 1, 1)]
    assert tree_sum(parts).item() == 2
    assert tree_sum(parts[:1]).item() == 1e8


@pytest.mark.parametrize("tp", TPS)
def test_pieces_lie_side_by_side_in_rank_order(tp: int) -> None:
    ranks = Ranks(tp)
    whole = np.arange(3 * 16, dtype=np.float32).reshape(3, 16)
    mesh = Mesh(np.array(jax.devices()[:tp]), (TP_AXIS,))

    def step(mine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return ranks.concat_last(mine)[None], ranks.index()[None]

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=P(None, TP_AXIS), out_specs=(P(TP_AXIS), P(TP_AXIS)), check_vma=False
    )
    everywhere, index = jax.jit(mapped)(whole)
    np.testing.assert_array_equal(everywhere, np.broadcast_to(whole, (tp, 3, 16)))
    np.testing.assert_array_equal(index, np.arange(tp))
