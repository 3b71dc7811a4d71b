"""The study: its configs, its loads, one small cell from runs to page, and what its cache keeps."""

import dataclasses
import json
import pathlib

import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.study import config as study_config
from nitsum_jax.sim.study.cache import Cache
from nitsum_jax.sim.study.config import phases_of, read_study
from nitsum_jax.sim.study.loads import Load, LoadPhase, Part
from nitsum_jax.sim.study.main import cells_of
from nitsum_jax.sim.study.page import page, plot_path, ratios, write_page
from nitsum_jax.sim.study.runner import run_cell
from nitsum_jax.sim.study.sources import open_traces

FOLDER = pathlib.Path(study_config.__file__).parent
SMALL = """
devices = 2
seed = 3
ratio = 1.4
finalists = 1
ablation_capacity = false
[[mixes.calm.phases]]
parts = [
  { trace = "conv", tier = "chat", rate = 0.6 },
  { trace = "code", tier = "code", rate = 0.4 },
]
[[mixes.turns.phases]]
parts = [{ trace = "conv", tier = "chat", rate = 1.0 }]
[[mixes.turns.phases]]
share = 0.5
parts = [{ trace = "code", tier = "code", rate = 0.7, prompt_scale = 2.0, output_scale = 4.0 }]
[cases.small]
profiles = ["llama-3.1-8b-h100"]
rate = 6.0
steady_s = 5.0
phase_s = 5.0
sample_s = 3.0
tiers.chat = { ttft_ms = 400, tpot_ms = 9 }
tiers.code = { ttft_ms = 3000, tpot_ms = 60 }
"""


@pytest.fixture(scope="module")
def traces() -> dict[str, object]:
    found, _ = open_traces(None, 0)
    return dict(found)


@pytest.mark.parametrize("name", ["study", "quick"])
def test_configs_of_the_package_are_sound(name: str) -> None:
    config = read_study(FOLDER / f"{name}.toml")
    profiles = {profile for case in config.cases for profile in case.profiles}
    models = {"llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b"}
    assert profiles == {f"{model}-{device}" for model in models for device in ("h100", "h200")}
    assert {mix.shifting for mix in config.mixes} == {False, True}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("devices = 2", "device = 2", "unknown entry 'device'"),
        ("ratio = 1.4", "", "'ratio' is missing"),
        ("tpot_ms = 9", "tpot_ms = -1", "tpot_ms=-1 must be a number above 0"),
        ('trace = "conv", ', "", "missing 1 required"),
        ("seed = 3", "seed = ", "not valid TOML"),
        ("devices = 2", "devices = 0", "devices=0 must be a number above 0"),
        ("phase_s = 5.0", "phase_s = -1", "phase_s=-1 must be a number above 0"),
        ('tier = "code", rate = 0.4', 'tier = "cod", rate = 0.4', "unknown tier 'cod'"),
    ],
)
def test_wrong_configs_are_told_in_one_line(tmp_path: pathlib.Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(InvalidInputError) as error:
        read_study(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_loads_have_the_rates_and_lengths_of_their_phases(traces) -> None:  # type: ignore[no-untyped-def]
    phases = (LoadPhase(100.0, (Part("conv", "chat", 6.0),)), LoadPhase(50.0, (Part("code", "code", 4.0, 2.0, 3.0),)))
    load = Load("two", traces, phases, seed=1)
    assert load.seconds == 150.0
    assert load.rate == pytest.approx((100 * 6 + 50 * 4) / 150)
    for factor in (0.5, 1.0, 2.3):
        work = load.at(factor)
        first = [r for r in work.requests if r.arrival_s < 100]
        second = [r for r in work.requests if r.arrival_s >= 100]
        assert {r.tier for r in first} == {"chat"}
        assert {r.tier for r in second} == {"code"}
        assert len(first) == pytest.approx(600 * factor, rel=0.05)
        assert len(second) == pytest.approx(200 * factor, rel=0.12)
    plain = Load("plain", traces, (phases[0], LoadPhase(50.0, (Part("code", "code", 4.0),))), seed=1).at(1.0)
    longer = load.at(1.0)
    assert sum(r.prompt_tokens for r in longer.requests if r.tier == "code") == pytest.approx(
        2 * sum(r.prompt_tokens for r in plain.requests if r.tier == "code"), rel=0.01
    )
    keys = [(r.arrival_s, r.prompt_tokens) for r in load.at(1.0).requests]
    assert set(keys) <= {(r.arrival_s, r.prompt_tokens) for r in load.at(1.5).requests}


def test_a_cell_from_runs_to_page(tmp_path: pathlib.Path, traces) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    config = read_study(path)
    results = []
    for cell in cells_of(config, traces, "stand-ins", tmp_path / "cache"):
        values = run_cell(cell)
        lines = (tmp_path / "cache" / f"{cell.name}.jsonl").read_text().splitlines()
        assert json.loads(json.dumps(values)) == json.loads(json.dumps(run_cell(cell)))  # from the cache: the same
        assert (tmp_path / "cache" / f"{cell.name}.jsonl").read_text().splitlines() == lines  # and nothing ran again
        families = values["families"]
        assert {"adaptive", "static", "static-tp1", "static-tp2", "distserve", "sarathi", "apart", "dynamo"} <= set(
            families
        )
        assert families["static"]["capacity"] >= max(
            families["static-tp1"]["capacity"], families["static-tp2"]["capacity"]
        )
        assert 0 < values["bound"]["attainment"] <= 1
        assert set(values["ablations"]) == {"tp-fixed", "split-fixed", "homogeneous", "fcfs", "device-put"}
        results.append(values)
    assert {values["shifting"] for values in results} == {False, True}
    assert {"steady", "bound"} <= set(ratios(results))
    assert {"windows", "reach", "room"} <= set(ratios(results))
    write_page(results, tmp_path / "docs", missing=1)
    text = (tmp_path / "docs" / "goodput.md").read_text()
    assert text == page(results, missing=1)
    for values in results:
        assert plot_path(values) in text
        assert (tmp_path / "docs" / plot_path(values)).exists()
    assert "1 cells of the study's config have not been run" in text


def test_phases_take_times_and_rates_of_their_case() -> None:
    config = read_study(FOLDER / "quick.toml")
    case = dataclasses.replace(config.cases[0], rate=10.0, phase_s=30.0)
    mix = next(mix for mix in config.mixes if mix.shifting)
    phases = phases_of(mix, case)
    assert [phase.seconds for phase in phases] == [30.0] * 4
    assert phases[0].parts[0].rate == pytest.approx(12.0)


def test_a_torn_line_of_the_cache_is_passed_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "cache.jsonl"
    cache = Cache(path)
    assert cache.get("a", lambda: 1) == 1
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    again = Cache(path)
    assert again.get("a", lambda: 2) == 1
    assert again.get("b", lambda: 3) == 3
