import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nitsum_jax.profiles import smooth

SECONDS = st.floats(1e-6, 10.0)


@settings(max_examples=30)
@given(hnp.arrays(float, st.integers(2, 12), elements=SECONDS))
def test_any_times_become_a_line(seconds: np.ndarray) -> None:
    line = smooth.line(range(1, len(seconds) + 1), seconds)  # would raise if it fell
    assert min(seconds) * 0.999 <= line.seconds[0] <= line.seconds[-1] <= max(seconds) * 1.001


@settings(max_examples=30)
@given(hnp.arrays(float, st.tuples(st.integers(2, 6), st.integers(2, 6)), elements=SECONDS))
def test_any_times_become_a_plane(seconds: np.ndarray) -> None:
    rows, columns = seconds.shape
    plane = smooth.plane(range(1, rows + 1), range(columns), seconds)  # would raise if it fell
    assert plane.seconds[0][0] >= seconds.min() * 0.999


@settings(max_examples=30)
@given(hnp.arrays(float, (4, 5), elements=st.floats(1e-3, 1.0)))
def test_what_never_falls_stays(steps: np.ndarray) -> None:
    seconds = np.cumsum(np.cumsum(steps, axis=0), axis=1)
    plane = smooth.plane((1, 2, 3, 4), (0, 1, 2, 3, 4), seconds)
    np.testing.assert_allclose(plane.seconds, seconds, rtol=2e-3)


def test_noise_is_evened_out_not_lifted() -> None:
    line = smooth.line((1, 2, 3, 4), (1.0, 1.2, 1.0, 1.3))
    assert line.seconds == (1.0, 1.095, 1.095, 1.3)  # the geometric mean of both
