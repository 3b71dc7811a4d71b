"""Logs: what is written is read back bit for bit, and lines that are wrong are named."""

import json
import pathlib
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import AdaptiveController
from nitsum_jax.control.planning.decision import PlanInputs, PlannerConfig
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.runs.logs import LogFolder, read_folder, request_record
from nitsum_jax.sim.runs.records import (
    DecisionRecord,
    RequestRecord,
    StepRecord,
    SwitchRecord,
    read_decisions,
    read_requests,
    read_steps,
    read_summary,
    read_switches,
    to_line,
)
from tests.sim.small_run import DEVICES, MIXED, TIERS, cost_model, run, workload

TIMES = st.floats(0, 1e7)
NAMES = st.text(max_size=8)
WHOLE = st.integers(0, 1 << 40)
LISTS = st.lists(WHOLE, max_size=4).map(tuple)
REQUESTS = st.builds(
    RequestRecord, NAMES, NAMES, TIMES, WHOLE, WHOLE, st.none() | TIMES, st.none() | TIMES, LISTS, st.booleans()
)
STEPS = st.builds(StepRecord, WHOLE, LISTS, WHOLE, TIMES, TIMES, WHOLE, WHOLE, LISTS, LISTS)
SWITCHES = st.builds(SwitchRecord, TIMES, NAMES, NAMES, LISTS, TIMES, TIMES, WHOLE, WHOLE)
DECISIONS = st.builds(DecisionRecord, TIMES, st.dictionaries(NAMES, WHOLE), st.lists(WHOLE), NAMES, NAMES)


def write_records(
    path: pathlib.Path, records: Iterable[RequestRecord | StepRecord | SwitchRecord | DecisionRecord]
) -> None:
    path.write_text("".join(map(to_line, records)), encoding="utf-8")


@given(*(st.lists(kind, max_size=3) for kind in (REQUESTS, STEPS, SWITCHES, DECISIONS)))
@settings(max_examples=50)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[RequestRecord],
    steps: list[StepRecord],
    switches: list[SwitchRecord],
    decisions: list[DecisionRecord],
) -> None:
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    write_records(path, requests)
    assert list(read_requests(path)) == requests
    write_records(path, steps)
    assert list(read_steps(path)) == steps
    write_records(path, switches)
    assert list(read_switches(path)) == switches
    write_records(path, decisions)
    assert list(read_decisions(path)) == decisions


def test_the_keys_are_those_of_the_documents() -> None:
    request = RequestRecord("a", "chat", 0.0, 1, 1, None, None, (), False)
    step = StepRecord(0, (0, 1), 2, 0.5, 0.75, 3, 99, (16, 8), (0, 32))
    assert list(json.loads(to_line(request))) == (
        ["id", "tier", "arrival_s", "prompt_tokens", "output_tokens", "first_token_s", "finish_s", "instances", "met"]
    )
    assert json.loads(to_line(step)) == {
        "instance": 0,
        "devices": [0, 1],
        "tp": 2,
        "start_s": 0.5,
        "end_s": 0.75,
        "decode_sequences": 3,
        "context_tokens": 99,
        "prefill_tokens": [16, 8],
        "prefill_context": [0, 32],
    }
    switch = SwitchRecord(1.0, "tp1@0", "tp1@1", (0, 1), 0.1, 5.0, 1, 0)
    assert list(json.loads(to_line(switch))) == (
        ["time_s", "from_layout", "to_layout", "devices", "stall_s", "kv_bytes", "sequences", "requeued"]
    )


GOOD = json.loads(to_line(RequestRecord("a", "chat", 0.0, 1, 1, 0.5, 1.0, (0,), True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arrival_s": "0"}, "'0' must be a number"),
        ({"arrival_s": float("nan")}, "nan must be a number"),
        ({"prompt_tokens": -1}, "-1 must be a whole number"),
        ({"prompt_tokens": 1.5}, "1.5 must be a whole number"),
        ({"output_tokens": True}, "True must be a whole number"),
        ({"finish_s": [1]}, r"\[1\] must be a number"),
        ({"instances": 3}, "3 must be a list"),
        ({"instances": [0.5]}, "0.5 must be a whole number"),
        ({"met": 1}, "1 must be true or false"),
        ({"id": 7}, "7 must be text"),
    ],
)
def test_wrong_values_are_named_with_their_line(
    change: dict[str, object], message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change) + "\n")
    with pytest.raises(InvalidInputError, match=rf"requests\.jsonl:2: not a RequestRecord: {message}"):
        list(read_requests(path))


@pytest.mark.parametrize("line", ["{", "[]", "3", json.dumps({k: v for k, v in GOOD.items() if k != "met"})])
def test_wrong_lines_are_named(line: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidInputError, match=r"requests\.jsonl:1: ") as e:
        list(read_requests(path))
    assert "\n" not in str(e.value)
    if "tier" in line:
        assert str(e.value).endswith("'met' is missing")


def test_files_that_are_missing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read the log"):
        list(read_steps(tmp_path / "steps.jsonl"))
    with pytest.raises(InvalidInputError, match="cannot read the summary"):
        read_folder(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(InvalidInputError, match="a summary is a JSON object"):
        read_summary(tmp_path / "summary.json")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        read_summary(tmp_path / "summary.json")
    with pytest.raises(InvalidInputError, match="cannot write the logs"):
        LogFolder(tmp_path / "summary.json")


def test_requests_are_recorded_as_their_jobs_stand() -> None:
    chat = TIERS.get("chat")
    job = ModelJob("7", chat, 1.0, 20, 3, first_token_s=1.2, finish_s=1.22, instances=[4, 5])
    assert request_record(job) == RequestRecord("7", "chat", 1.0, 20, 3, 1.2, 1.22, (4, 5), True)
    job.finish_s = None
    assert request_record(job).met is False


def test_failed_requests_are_in_the_log(tmp_path: pathlib.Path) -> None:
    with LogFolder(tmp_path) as log:
        log.failed(ModelJob("7", TIERS.get("chat"), 1.0, 20, 3, first_token_s=1.2, finish_s=1.22), "no room")
    (record,) = read_requests(tmp_path / "requests.jsonl")
    assert (record.finish_s, record.met) == (None, False)


def test_a_run_writes_the_same_bytes_twice(tmp_path: pathlib.Path) -> None:
    for name in ("a", "b"):
        run(tmp_path / name, workload(seconds=5))
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_decision_can_be_made_again_from_the_log(tmp_path: pathlib.Path) -> None:
    cost = cost_model()
    controller = AdaptiveController(cost, TIERS, planner=PlannerConfig(satisfied=1.1))  # all plans are compared
    for i, r in enumerate(workload(seconds=10).requests):
        job = ModelJob(str(i), TIERS.get(r.tier), r.arrival_s, r.prompt_tokens)
        controller.arrived(r.arrival_s, JobView.of(job))
    decision = controller.tick(10.0, CellView(MIXED, DEVICES))
    assert decision is not None
    with LogFolder(tmp_path) as log:
        log.decided(decision)
    (record,) = read_decisions(tmp_path / "decisions.jsonl")
    inputs = PlanInputs.from_json(record.inputs)
    assert inputs == decision.inputs
    again = controller.planner.decide(inputs)
    assert (again.choice.unplaced, again.reason) == (record.choice, record.reason)
    assert len(record.candidates) == len(decision.candidates) > 1


def test_many_steps_are_written_and_read(tmp_path: pathlib.Path) -> None:
    steps = [StepRecord(0, (0, 1), 2, i * 0.01, i * 0.01 + 0.00987, 40, 40_000 + i, (), ()) for i in range(20_000)]
    write_records(tmp_path / "steps.jsonl", steps)
    assert list(read_steps(tmp_path / "steps.jsonl")) == steps
