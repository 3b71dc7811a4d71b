"""nitsum-profile --model: tables from bucket times, and the whole on a tiny model."""

import pathlib
import subprocess
import sys
from typing import cast

import numpy as np
import pytest

from nitsum_jax.bench.profiling import main, measure
from nitsum_jax.bench.profiling.steps import StepTimer
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import read_profile
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import InvalidInputError
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")


class FakeTimer:
    """Buckets whose times are formulas; the largest bucket does not fit behind much context."""

    shapes: tuple[StepShape, ...] = (
        StepShape(1, 1),
        StepShape(1, 32),
        StepShape(1, 128),
        StepShape(8, 1),
        StepShape(32, 1),
    )

    def fits(self, shape: StepShape, context: int) -> bool:
        return context + shape.tokens <= 1152 and (shape.batch < 32 or context <= 512)

    def seconds(self, shape: StepShape, context: int) -> float:
        return 0.001 + shape.batch * shape.tokens * (1e-5 + 1e-7 * context)


TIMER = cast(StepTimer, FakeTimer())
CONTEXTS = (0, 128, 256, 512, 1024, 2048)


def test_a_bucket_costs_the_same_however_full_it_is() -> None:
    plane = measure._plane(TIMER, CONTEXTS, decode=True)
    assert (plane.rows, plane.columns) == ((1, 2, 8, 9, 32, 64), (0, 128, 256, 512, 1024))
    for context in (0, 200, 512):
        for sequences, bucket in ((1, 1), (2, 8), (5, 8), (8, 8), (9, 32), (31, 32)):
            expected = FakeTimer().seconds(StepShape(bucket, 1), context)
            assert plane.at(sequences, context) == pytest.approx(expected, rel=1e-3)
        assert plane.at(64, context) == pytest.approx(2 * plane.at(32, context), rel=1e-3)


def test_contexts_that_do_not_fit_are_drawn_on() -> None:
    plane = measure._plane(TIMER, CONTEXTS, decode=True)
    assert plane.at(32, 1024) == pytest.approx(FakeTimer().seconds(StepShape(32, 1), 1024), rel=1e-3)


def test_chunks_stand_at_the_ends_of_their_buckets() -> None:
    plane = measure._plane(TIMER, CONTEXTS, decode=False)
    assert plane.rows == (1, 32, 33, 128, 256)
    assert plane.at(100, 300) == pytest.approx(FakeTimer().seconds(StepShape(1, 128), 300), rel=1e-3)


def test_what_mixed_steps_save_is_shared() -> None:
    class Fused(FakeTimer):
        shapes = (*FakeTimer.shapes, StepShape(1, 32, 32), StepShape(1, 128, 32))

        def seconds(self, shape: StepShape, context: int) -> float:
            return sum(super(Fused, self).seconds(part, context) for part in shape.parts) - 0.0008 * shape.is_mixed

    timer = cast(StepTimer, Fused())
    assert measure._shared_s(timer, CONTEXTS) == pytest.approx(0.0008)
    plane = measure._plane(timer, CONTEXTS, decode=True)
    assert plane == measure._plane(TIMER, CONTEXTS, decode=True)
    assert measure._less(plane, 0.0008).at(8, 128) == pytest.approx(plane.at(8, 128) - 0.0008)


def test_too_little_room_is_told() -> None:
    with pytest.raises(InvalidInputError, match="--max_model_len leaves no room for two contexts"):
        measure._plane(TIMER, (0, 2048), decode=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out=/nowhere/at/all.json"], "--out=/nowhere/at/all.json must name a file in a folder"),
        (["--out=x.json", "--layout=tp3"], "tp3"),
        (["--out=x.json"], "there is no model"),
    ],
)
def test_wrong_flags_are_one_line(
    arguments: list[str],
    says: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    wants_model = any(argument.startswith("--layout") for argument in arguments)
    model = tiny_models.write_hf_folder("llama_gqa_tied", tmp_path / "model") if wants_model else "no-such-model"
    assert main.main(["nitsum-profile", f"--model={model}", "--cache_dir=off", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_a_tiny_model_is_measured(tmp_path: pathlib.Path) -> None:
    folder = tiny_models.write_hf_folder("llama_gqa_tied", tmp_path / "model")
    out = tmp_path / "tiny.json"
    # A process of its own: it chooses its number of devices before JAX starts.
    command = [sys.executable, "-m", "nitsum_jax.bench.profiling.main", f"--model={folder}", f"--out={out}", "--quick"]
    command += ["--devices=2", "--dtype=float32", "--max_batch=4", "--prefill_chunk=8", "--name=tiny"]
    command += [f"--cache_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    profile = read_profile(out)
    assert (profile.name, profile.devices, profile.mixed_steps, tuple(profile.tps)) == ("tiny", 2, False, (1, 2))
    config = tiny_models.VARIANTS["llama_gqa_tied"]
    width = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * width * 4
    assert profile.kv_bytes_per_token == kv
    for times in profile.tps.values():
        assert times.decode_attention.rows == (1, 2, 4, 8)
        assert times.prefill_attention.rows == (1, 8, 16)
        assert np.min(times.decode_attention.seconds) > 0
    cost = CostModel(profile)
    assert cost.step_s(2, 3, 60, [(8, 0)]) == pytest.approx(cost.step_s(2, 3, 60) + cost.step_s(2, 0, 0, [(8, 0)]))
    # The engine's pool, beside the weights of TP 1, is twice as large for two devices.
    assert cost.kv_capacity_tokens(2, resident_tp=1) == pytest.approx(2 * cost.kv_capacity_tokens(1), abs=1)
    assert min(profile.switch_host_s, profile.link_bytes_per_s, profile.device_put_bytes_per_s) > 0
