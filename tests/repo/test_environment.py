"""The settings of tests/conftest.py are in force: without them other tests would prove less than they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def test_eight_emulated_cpu_devices() -> None:
    devices = jax.devices()
    assert len(devices) == 8
    assert {d.platform for d in devices} == {"cpu"}


def test_mixed_dtypes_raise() -> None:
    with pytest.raises(ValueError, match="implicit dtype promotion"):
        jnp.zeros(2, jnp.bfloat16) + jnp.zeros(2, jnp.float32)


def test_mixed_ranks_raise() -> None:
    with pytest.raises(ValueError, match="rank"):
        jnp.zeros((2, 3)) + jnp.zeros(3)


def test_warnings_raise() -> None:
    with pytest.raises(RuntimeWarning):
        np.float32(1) / np.zeros(1, np.float32)
