"""The ladder: its config, its rungs, one small cell from runs to page, and capacities of fitted curves."""

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.profile import write_profile
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.profiles import load_profile
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.study.ladder.config import read_ladder
from nitsum_jax.sim.study.ladder.fit import capacity, falling
from nitsum_jax.sim.study.ladder.page import WORDS, page, write_page
from nitsum_jax.sim.study.ladder.rungs import DEPLOYED, STATIC, Entrant, rungs
from nitsum_jax.sim.study.ladder.runner import Runs, loads_of, run_ladder, serve
from nitsum_jax.sim.study.sources import open_traces
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

SMALL = """
loads = [0.5, 3.0]
search_loads = [1.0]
sample_s = 1.0
[[cells]]
case = "small"
profile = "llama-3.1-8b-h100"
devices = 2
mix = "turns"
rate = 8.0
seeds = [0, 1]
[[mixes.turns.phases]]
parts = [{ trace = "conv", tier = "chat", rate = 1.0 }]
[[mixes.turns.phases]]
share = 0.5
parts = [{ trace = "code", tier = "code", rate = 0.7, prompt_scale = 2.0 }]
[cases.small]
phase_s = 2.0
tiers.chat = { ttft_ms = 400, tpot_ms = 9 }
tiers.code = { ttft_ms = 3000, tpot_ms = 60 }
"""
TIERS = TierSet((Tier("chat", 400, 9), Tier("code", 3000, 60)))
SETTING = Setting(CostModel(load_profile("llama-3.1-8b-h100")), TIERS, 2)


def burst(count: int, tier: str = "chat") -> Workload:
    """So many requests at once."""
    return Workload(tuple(TraceRequest(0.001 * i, 1500, 20, tier) for i in range(count)), "burst", 1.0)


def entrants(rung: str, workload: Workload) -> list[Entrant]:
    return list(rungs(SETTING, loads_of(workload))[rung]())


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("ladder")
    path = folder / "small.toml"
    path.write_text(SMALL)
    config = read_ladder(path)
    traces, source = open_traces(None, 0)
    runs = Runs(config, config.cells[0], traces, source, folder)
    values = run_ladder(runs)
    lines = (folder / "ladder_small_2_turns.jsonl").read_text()
    assert run_ladder(runs) == values
    assert (folder / "ladder_small_2_turns.jsonl").read_text() == lines, "a run that was in the cache was run again"
    return json.loads(json.dumps(values))


def test_the_config_of_the_package_covers_half_to_four_times_the_load() -> None:
    config = read_ladder("ladder")
    assert (min(config.loads), max(config.loads)) == (0.5, 4.0)
    assert {(cell.case, cell.devices) for cell in config.cells} == {("qwen-14b", 8), ("llama-8b", 8), ("llama-8b", 4)}
    for cell in config.cells:
        seconds = sum(phase.seconds for phase in cell.phases)
        offered = sum(phase.seconds * sum(part.rate for part in phase.parts) for phase in cell.phases)
        assert offered / seconds == pytest.approx(cell.rate)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rate = 8.0", "", "'rate' is missing"),
        ('case = "small"', 'case = "large"', "'large' is missing"),
        ("tpot_ms = 9", "tpot_ms = -1", "tpot_ms=-1 must be a number above 0"),
        ("sample_s = 1.0", "sample_s = ", "not valid TOML"),
        ("sample_s = 1.0", "sample_s = 1.0\nrate = 3", "unknown entry 'rate'"),
        ("loads = [0.5, 3.0]", "loads = []", "loads is empty"),
        ("search_loads = [1.0]", "search_loads = [-1]", "search_loads=-1 must be a number above 0"),
        ("devices = 2", "devices = 0", "devices=0 must be a number above 0"),
        ("seeds = [0, 1]", "seeds = []", "seeds is empty"),
        ("phase_s = 2.0", "phase_s = 0", "seconds=0.0 must be a number above 0"),
        ('tier = "code", rate', 'tier = "cod", rate', "unknown tier 'cod'"),
    ],
)
def test_wrong_configs_are_told_in_one_line(tmp_path: pathlib.Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(old, new, 1))
    with pytest.raises(InvalidInputError) as error:
        read_ladder(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "flags", "says"),
    [
        ('profile = "llama-3.1-8b-h100"', 'profile = "llama"', (), "no profile is called 'llama'"),
        ('trace = "code"', 'trace = "cod"', (), "unknown trace 'cod'"),
        ("", "", ("--only=large",), "--only=large is in no cell's name: there are small_2_turns"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line_before_anything_runs(
    tmp_path: pathlib.Path, old: str, new: str, flags: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SMALL.replace(old, new, 1))
    tool = [sys.executable, "-m", "nitsum_jax.sim.study.ladder.main", f"--config={path}", f"--cache={tmp_path}"]
    done = subprocess.run([*tool, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["wrong.toml"]


def test_with_another_profile_of_the_same_name_all_is_run_again(tmp_path: pathlib.Path) -> None:
    """As after the packaged profiles were derived anew: what the cache has was of other step times."""
    (tmp_path / "small.toml").write_text(SMALL.replace("loads = [0.5, 3.0]", "loads = [3.0]").replace("[0, 1]", "[0]"))
    config = read_ladder(tmp_path / "small.toml")
    profile = load_profile("llama-3.1-8b-h100")
    cell = dataclasses.replace(config.cells[0], profile=str(tmp_path / "p.json"))
    traces, source = open_traces(None, 0)
    found = []
    for overhead_s in (profile.host_overhead_s, 0.02):
        write_profile(dataclasses.replace(profile, host_overhead_s=overhead_s), cell.profile)
        values = run_ladder(Runs(config, cell, traces, source, tmp_path / "cache"))
        found.append(values["rungs"]["ours-adaptive"][0]["seeds"][0]["goodput"])
    assert found[1] < 0.8 * found[0]  # no chat has a token in 9 ms if a step's overhead is 20


def test_every_rung_has_figures_at_every_load_and_seed(result) -> None:  # type: ignore[no-untyped-def]
    assert list(result["rungs"]) == list(WORDS)
    assert {*DEPLOYED, *STATIC} <= set(WORDS)
    for rows in result["rungs"].values():
        assert [row["load"] for row in rows] == [0.5, 3.0]
        for row in rows:
            assert len(row["seeds"]) == 2
            for seed in row["seeds"]:
                offered, met = (sum(pair[i] for pair in seed["tiers"].values()) for i in (0, 1))
                assert seed["attainment"] == pytest.approx(met / offered)
                assert seed["goodput"] <= seed["rate"]


def test_the_page_has_a_row_for_every_rung_and_a_plot(result, tmp_path: pathlib.Path) -> None:  # type: ignore[no-untyped-def]
    write_page([result], tmp_path, ["other_8_steady"])
    text = (tmp_path / "ladder.md").read_text()
    assert text == page([result], ["other_8_steady"])
    assert "not run: other_8_steady" in text
    for words in WORDS.values():
        assert f"| {words} |" in text
    rungs_run = {name: rows for name, rows in result["rungs"].items() if name != "ours-device-put"}
    assert "Not run: `ours-device-put`." in page([{**result, "rungs": rungs_run}])
    assert "2 NVIDIA H200 SXM, turns" in page([{**result, "device": "NVIDIA H200 SXM, 141 GB"}])
    assert (tmp_path / "ladder" / "small_2_turns.svg").read_text().startswith("<?xml")


def test_ratios_count_queues_with_timeouts_and_name_the_row_they_are_over(result) -> None:  # type: ignore[no-untyped-def]
    def row(load: float, goodput: float) -> dict[str, object]:
        return {
            **result["rungs"]["vanilla"][0],
            "load": load,
            "seeds": [{**seed, "goodput": goodput} for seed in seeds],
        }

    seeds = result["rungs"]["vanilla"][0]["seeds"]
    made = {rung: [row(0.5, 1.0), row(3.0, 1.0)] for rung in WORDS}
    made |= {"ours-adaptive": [row(0.5, 6.0), row(3.0, 6.0)], "ours-apart": [row(0.5, 6.25), row(3.0, 1.0)]}
    made |= {"vanilla-timeouts": [row(0.5, 1.0), row(3.0, 4.0)], "dynamo": [row(0.5, 5.0), row(3.0, 1.0)]}
    text = page([{**result, "rungs": made}])
    assert "| 1.20 `dynamo` | 1.50 `vanilla-timeouts` |" in text
    assert "| 0.96 `ours-apart` | 6.00 `ours-static-tp` |" in text


def test_a_rung_names_the_same_policies_every_time() -> None:
    for make in rungs(SETTING, loads_of(burst(50))).values():
        names = [entrant.name for entrant in make()]
        assert names
        assert [entrant.name for entrant in make()] == names


def test_dealt_requests_wait_in_the_queue_of_their_replica() -> None:
    """Every other request is long: dealt in turn, all of these go to one of two replicas, and delay no short one."""
    lengths = (6000, 200)
    requests = tuple(TraceRequest(0.02 * i, lengths[i % 2], 5, "code") for i in range(120))
    workload = Workload(requests, "odd", 2.4)
    dealt = next(e for e in entrants("vanilla", workload) if "tp1x2" in e.name and "chunk 8192" in e.name)
    shared = next(e for e in entrants("least-loaded", workload) if "tp1x2" in e.name and "chunk 8192" in e.name)
    assert serve(SETTING, workload, dealt)["goodput"] > serve(SETTING, workload, shared)["goodput"]


def test_clients_that_go_leave_the_replica_to_others() -> None:
    workload = burst(300)
    patient = entrants("vanilla", workload)
    leaving = entrants("vanilla-timeouts", workload)
    assert [e.name for e in patient] == [e.name for e in leaving]
    more = Workload((*workload.requests, *(TraceRequest(1.5, 300, 20, "chat"),) * 4), "burst", 2.0)
    for one, other in zip(patient, leaving, strict=True):
        if "tp2" in one.name:
            assert serve(SETTING, more, one)["tiers"]["chat"][1] + 4 <= serve(SETTING, more, other)["tiers"]["chat"][1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_fitted_curves_never_rise_and_keep_the_mean(values: list[float]) -> None:
    fitted = falling(values)
    assert len(fitted) == len(values)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values))


def test_capacity_is_where_the_fitted_curve_crosses() -> None:
    assert capacity([10, 20, 30], [1.0, 0.95, 0.75]) == pytest.approx(22.5)
    assert capacity([10, 20, 30], [1.0, 0.86, 0.95]) == 30  # noise: the fit has 0.905 at both
    assert capacity([10, 20], [0.8, 0.7]) is None
    assert capacity([10, 20], [1.0, 0.99]) == 20
