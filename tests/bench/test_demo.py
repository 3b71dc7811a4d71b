"""What the demonstration shows and works out; the cell itself is that of nitsum-serve."""

import dataclasses

from nitsum_jax.bench.demo.load import PHASES, TIERS, demo_load
from nitsum_jax.bench.demo.prediction import adaptive_policy, best_uneven, predict, static_policy
from nitsum_jax.bench.demo.report import ADAPTIVE, Entry, gain, tables, to_json
from nitsum_jax.bench.demo.screen import Screen, attainments
from nitsum_jax.bench.serve.player import Played, PlayedRun
from nitsum_jax.bench.serve.results import results_of
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.server.proto import nitsum_pb2
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload


def _setting() -> Setting:
    return Setting(CostModel(load_profile("qwen2.5-32b-h100")), TIERS, 8)


def test_load_shifts_from_phase_to_phase() -> None:
    load = demo_load(20, 1.0, 3)
    assert load == demo_load(20, 1.0, 3)
    assert load.seconds == 80
    for index, phase in enumerate(PHASES):
        mine = [r for r in load.requests if 20 * index <= r.arrival_s < 20 * (index + 1)]
        chat = sum(r.tier == "chat" for r in mine)
        assert abs(chat - 20 * phase.chat) < 5 * (20 * phase.chat) ** 0.5 + 3
        assert abs(len(mine) - chat - 20 * phase.code) < 5 * (20 * phase.code) ** 0.5 + 3


def test_attainment_of_the_last_seconds() -> None:
    def played(tier: str, first_s: float, last_s: float) -> Played:
        return Played(TraceRequest(0.0, 10, 11, tier), 0.0, first_s, last_s, 11)

    good, late = played("chat", 0.5, 0.6), played("chat", 5.0, 5.1)
    alive = Played(TraceRequest(0.0, 10, 11, "code"), 0.0, 0.5, 0.6, 3)
    assert attainments([good, late, alive], TIERS, 1.0, 6.0) == {"chat": (1, 2), "code": (0, 0)}
    assert attainments([good, late, alive], TIERS, 1.0, 11.0) == {"chat": (0, 1), "code": (0, 0)}
    # At a time scale of 10 what came at 5 s came at 0.5 s of the target.
    assert attainments([late], TIERS, 10.0, 1.0) == {"chat": (1, 1), "code": (0, 0)}


def _layout(text: str) -> nitsum_pb2.GetLayoutResponse:
    return nitsum_pb2.GetLayoutResponse(
        layout=text,
        devices=["0", "1"],
        instances=[nitsum_pb2.Instance(devices=[0, 1], tp=2, role="decode", running=3, kv_use=0.5)],
        pace=nitsum_pb2.Pace(profile="p"),
    )


def test_screen_draws_over_itself_on_a_terminal_and_writes_lines_elsewhere() -> None:
    out: list[str] = []
    screen = Screen(out.append, terminal=True)
    screen.show("x", 1.0, _layout("tp2"), {"chat": (1, 2)})
    screen.show("x", 2.0, _layout("tp2"), {"chat": (1, 2)})
    assert "PACED" in out[0]
    assert "chat 50%" in out[0]
    assert out[1] == "\x1b[3A"

    lines: list[str] = []
    screen = Screen(lines.append, terminal=False)
    for now, text in ((1.0, "tp2"), (2.0, "tp2"), (3.0, "tp1x2"), (9.0, "tp1x2")):
        screen.show("x", now, _layout(text), {"chat": (0, 0)})
    assert len(lines) == 3
    assert all(line.startswith("PACED") and "\x1b" not in line for line in lines)
    assert "tp2@0-1:decode(3)" in lines[0]


def test_tables_compare_policies_and_the_simulator() -> None:
    setting = _setting()
    load = Workload(tuple(TraceRequest(0.1 * i, 100, 11, "chat") for i in range(10)), "w", 2.0)
    simulated = predict(setting, load, static_policy(setting, "tp4x2"), 64)
    assert simulated.total.attainment == 1

    def entry(name: str, tpot_s: float) -> Entry:
        played = [
            Played(r, r.arrival_s, r.arrival_s + 0.2, r.arrival_s + 0.2 + 10 * tpot_s * (1 if i < 8 else 10), 11)
            for i, r in enumerate(load.requests)
        ]
        return Entry(name, results_of(PlayedRun(played, 2.0, 0.0, 0.1), TIERS, 2.0, paced="p"), simulated, 2)

    entries = [entry(ADAPTIVE, 0.001), entry("tp2x4", 0.01)]
    assert gain(entries) == 10 / 8
    text = tables(entries, "p")
    assert text.startswith("PACED at p")
    assert "1.25 times the goodput" in text
    assert to_json(entries, "p")["policies"]["tp2x4"]["switches"] == 2
    assert gain(entries[:1]) is None
    late = dataclasses.replace(entries[0], live=dataclasses.replace(entries[0].live, invalid=("too slow",)))
    text = tables([late, entries[1]], "p")
    assert "the comparison says nothing" in text
    assert "times the goodput" not in text
    assert "INVALID adaptive: too slow" in text


def test_prediction_knows_every_policy() -> None:
    setting = _setting()
    load = demo_load(4, 0.5, 0)
    adaptive = predict(setting, load, adaptive_policy(setting, "tp4x2"), 64)
    assert adaptive.total.requests == len(load.requests)
    found = best_uneven(setting, load, 64)
    assert found is not None
    assert predict(setting, load, static_policy(setting, found), 64).total.requests == len(load.requests)
