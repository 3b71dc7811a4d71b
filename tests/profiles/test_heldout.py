"""Points that interpolation was not given are predicted within 10 % (median).

Two models at one TP each by default, from heldout.json.  NITSUM_CALIBRATION=DIR, a folder of kernel tables as
docs/simulator/profiles.md describes, checks every table and whole steps of every model.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np
import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.grids import Line
from nitsum_jax.control.model.profile import Profile, TpProfile
from nitsum_jax.profiles import smooth
from nitsum_jax.profiles.heldout import Errors, every_other, kernel_errors, step_errors, thinned
from nitsum_jax.profiles.shapes import DEVICES, Device
from nitsum_jax.profiles.tables import read_tables
from tests.control.profiles import roofline_profile, with_times
from tests.profiles import analytic

MOST = 0.10
CASES: list[dict[str, Any]] = json.loads(pathlib.Path(__file__).with_name("heldout.json").read_text())["cases"]
NAMES = [f"{case['model']} tp{case['tp']}" for case in CASES]
FOLDER = os.environ.get("NITSUM_CALIBRATION")


def profile_of(case: dict[str, Any]) -> Profile:
    """The profile of one TP, as deriving makes it from the half of the points that was kept."""
    parts = {name: case[name]["kept"] for name in ("dense", "decode_attention", "prefill_attention")}
    decode, prefill = parts["decode_attention"], parts["prefill_attention"]
    times = TpProfile(
        dense=smooth.line(parts["dense"]["tokens"], parts["dense"]["seconds"]),
        head=Line((1, 2), (case["head_s"],) * 2),
        decode_attention=smooth.plane(decode["sequences"], decode["context"], np.array(decode["seconds"])),
        prefill_attention=smooth.plane(prefill["new_tokens"], prefill["context"], np.array(prefill["seconds"])),
        kv_capacity_tokens=1,
    )
    return with_times(roofline_profile((1,)), 1, **{name: getattr(times, name) for name in TpProfile.__slots__})


def compare(kind: str, pairs: list[tuple[float, float]]) -> Errors:
    predicted, measured = np.array(pairs).T
    return Errors.of(kind, predicted, measured)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_parts_of_steps_that_were_left_out(case: dict[str, Any]) -> None:
    times = profile_of(case).tps[1]
    dense = [(times.dense.at(m), s) for m, s in case["dense"]["left_out"]]
    decode = [(times.decode_attention.at(n, c), s) for n, c, s in case["decode_attention"]["left_out"]]
    prefill = [(times.prefill_attention.at(n, c), s) for n, c, s in case["prefill_attention"]["left_out"]]
    for kind, pairs in (("dense", dense), ("decode", decode), ("prefill", prefill)):
        errors = compare(kind, pairs)
        assert errors.median <= MOST, errors
        assert errors.count >= 8


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_whole_steps_that_were_left_out(case: dict[str, Any]) -> None:
    """Decode steps, alone and with a chunk; dense times between two points that were left out are not compared."""
    cost = CostModel(profile_of(case))
    dense = dict(case["dense"]["left_out"])
    rest = 0.3e-3 + case["head_s"]
    decode = [
        (cost.step_s(1, n, n * c), rest + dense[n] + s)
        for n, c, s in case["decode_attention"]["left_out"]
        if n in dense
    ]
    prefill = [
        (cost.step_s(1, 0, 0, [(n, c)]), rest + dense[n] + s)
        for n, c, s in case["prefill_attention"]["left_out"]
        if n in dense
    ]
    for kind, pairs in (("decode step", decode), ("prefill step", prefill)):
        errors = compare(kind, pairs)
        assert errors.median <= MOST, errors
        assert errors.count >= 5


def test_every_other_keeps_ends_and_pairs() -> None:
    assert every_other(np.array([1, 2, 4, 16, 17, 32, 33, 64, 65])) == {2, 16, 17}


def test_errors_are_relative() -> None:
    errors = Errors.of("x", np.array([1.1, 2.0, 2.7, 5.0]), np.array([1.0, 2.0, 3.0, np.nan]))
    assert errors.count == 3
    assert [errors.median, errors.bias] == pytest.approx([0.1, 0.0])


def test_thinning_leaves_nothing_of_what_is_predicted(tmp_path: pathlib.Path) -> None:
    full = read_tables(analytic.write_tables(tmp_path), "h100_sxm")
    less = thinned(full)
    assert every_other(full.gemm.axes[0]).isdisjoint(less.gemm.axes[0].tolist())
    for heads, grid in full.decode.items():
        for axis in (0, 1):
            assert every_other(grid.axes[axis]).isdisjoint(less.decode[heads].axes[axis].tolist())
    sizes = {tuple(grid.axes[0].tolist()) for grid in less.collectives.values()}
    assert len(sizes) == 1


def test_formulas_are_predicted_almost_exactly(tmp_path: pathlib.Path) -> None:
    """The check itself: of times that are linear in what is interpolated there is next to no error."""
    tables = read_tables(analytic.write_tables(tmp_path), "h100_sxm")
    errors = {row.kind: row for row in kernel_errors(tables)}
    assert errors["product, over m"].p90 < 1e-6
    assert errors["decode attention, over context"].p90 < 1e-6
    assert errors["prefill attention, over the prompt"].median < 0.1
    for row in step_errors(tables, DEVICES[0]):
        assert row.median < 0.05, row


@pytest.mark.skipif(FOLDER is None, reason="NITSUM_CALIBRATION names no folder of kernel tables")
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_all_tables(device: Device) -> None:
    assert FOLDER is not None
    tables = read_tables(FOLDER, device.table)
    for row in (*kernel_errors(tables), *step_errors(tables, device)):
        assert row.median <= MOST, row
