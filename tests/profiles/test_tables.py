import pathlib

import numpy as np
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles.tables import read_tables
from tests.profiles import analytic


def test_tables_hold_what_the_files_say(tmp_path: pathlib.Path) -> None:
    tables = read_tables(analytic.write_tables(tmp_path), "h100_sxm")
    m, n, k = (list(axis) for axis in tables.gemm.axes)
    assert (m, n, k) == (list(analytic.TOKENS), list(analytic.SIZES), list(analytic.SIZES))
    assert tables.gemm.seconds[3, 2, 1] == pytest.approx(analytic.product(32, 1024, 512))
    assert np.isnan(tables.gemm.seconds[0, -1, -1])
    assert set(tables.decode) == set(tables.prefill) == set(analytic.HEADS)
    grid = tables.decode[32, 8, 128]
    assert grid.seconds[2, 9] == pytest.approx(analytic.decode(4, 1024, 8))
    assert np.isnan(grid.seconds[-1, -1])
    sizes = tables.collectives["all_reduce", "nccl", 4]
    assert sizes.seconds[4] == pytest.approx(analytic.collective(4096, 4, quick=False))


def test_without_leaves_values_out(tmp_path: pathlib.Path) -> None:
    gemm = read_tables(analytic.write_tables(tmp_path), "h100_sxm").gemm
    less = gemm.without(1, {512, 2048})
    assert 512 not in less.axes[1]
    assert np.array_equal(less.seconds[:, :2], gemm.seconds[:, [0, 2]], equal_nan=True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r":1: column 'm' is missing: the table needs m, n, k, ms"),
        ("m,n,ms\n1,2,3\n", r":1: column 'k' is missing"),
        ("m,n,k,ms\n", "the table has no rows"),
        ("m,n,k,ms\n1,2,3,0.1\n1,x,3,0.1\n", r"\.csv:3: n='x' must be a whole number, at least 1"),
        ("m,n,k,ms\n0,2,3,0.1\n", r"\.csv:2: m='0' must be a whole number"),
        ("m,n,k,ms\n1,2,3\n", r"\.csv:2: ms=None must be a number above 0"),
        ("m,n,k,ms\n1,2,3,nan\n", r"\.csv:2: ms='nan' must be a number above 0"),
        ("m,n,k,ms\n1,2,3,1\n1,2,3,2\n", r"\.csv:3: the same measurement stands twice"),
    ],
)
def test_files_that_are_not_sound(text: str, says: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a_gemm_bf16.csv").write_text(text)
    with pytest.raises(InvalidInputError, match=says) as caught:
        read_tables(tmp_path, "a")
    assert "\n" not in str(caught.value)


def test_folder_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match="not a folder with kernel tables"):
        read_tables(tmp_path / "none", "a")
