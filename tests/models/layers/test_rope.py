"""Rotary embedding against its definition: feature pairs are complex numbers that turn with the position."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from nitsum_jax.models.config import Rope
from nitsum_jax.models.layers.rope import inverse_frequencies, rotate, rotations
from nitsum_jax.models.layers.rope_scaling import RopeScaling
from tests.engine.reference import tiny_config

# As published with Llama 3.1 8B.
LLAMA_31 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192)


def turned(x: np.ndarray, positions: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """x[B, T, heads, A] turned in float64: feature i and i + A/2 are real and imaginary part."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    z = z * np.exp(1j * positions[..., None, None] * inverse.astype(np.float64))
    return np.concatenate([z.real, z.imag], axis=-1)


def test_unscaled_frequencies_fall_geometrically() -> None:
    frequencies = inverse_frequencies(Rope(10000.0), 8)
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert frequencies.dtype == np.float64


def test_llama3_scaling_stretches_long_waves_and_keeps_short_ones() -> None:
    plain = inverse_frequencies(Rope(500000.0), 128).astype(np.float64)
    scaled = inverse_frequencies(Rope(500000.0, LLAMA_31), 128)
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        turns = 8192 * before / (2 * math.pi)  # over the original context
        if turns < 1.0:
            kinds.add("stretched")
            expected = before / 8
        elif turns > 4.0:
            kinds.add("kept")
            expected = before
        else:
            kinds.add("blended")
            share = (turns - 1.0) / (4.0 - 1.0)
            expected = (1 - share) * before / 8 + share * before
        assert after == pytest.approx(expected, rel=1e-6)
    assert kinds == {"stretched", "kept", "blended"}


def test_linear_scaling_stretches_every_wave() -> None:
    config = tiny_config("llama_linear_rope")  # its checkpoint says: linear, factor 4
    plain, rope = inverse_frequencies(Rope(config.rope_theta), 16), config.rope_of(0)
    assert rope is not None
    np.testing.assert_allclose(inverse_frequencies(rope, 16), plain / 4, rtol=1e-6)


def test_rotation_is_a_complex_product() -> None:
    rng = np.random.default_rng(0)
    inverse = inverse_frequencies(Rope(10000.0), 16)
    x = rng.standard_normal((2, 5, 3, 16)).astype(np.float32)
    positions = rng.integers(0, 500, (2, 5)).astype(np.int32)
    actual = rotate(jnp.asarray(x), *rotations(jnp.asarray(positions), inverse))
    np.testing.assert_allclose(actual, turned(x, positions, inverse), rtol=0, atol=2e-4)


def test_scores_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(1)
    inverse = inverse_frequencies(Rope(10000.0), 16)
    q, k = (jnp.asarray(x.astype(np.float32)) for x in rng.standard_normal((2, 1, 1, 1, 16)))

    def score(query_at: int, key_at: int) -> float:
        at = [rotations(jnp.full((1, 1), position, jnp.int32), inverse) for position in (query_at, key_at)]
        return float(jnp.sum(rotate(q, *at[0]) * rotate(k, *at[1])))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(0, 0) == pytest.approx(float(jnp.sum(q * k)), abs=1e-6)
    assert abs(score(7, 3) - score(3, 7)) > 1e-3  # and it has a direction
