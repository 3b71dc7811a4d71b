"""The audit finds nothing in true logs, and finds each thing that is made wrong in them."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.sim.runs.audit import audit
from nitsum_jax.sim.runs.records import RequestRecord, StepRecord, SwitchRecord, read_requests, read_steps
from nitsum_jax.sim.runs.tables import RequestTable, StepTable
from nitsum_jax.sim.workloads.workload import Workload
from tests.sim.small_run import DEVICES, MIXED, SPLIT, TIERS, cost_model, run, workload


@dataclasses.dataclass
class Logs:
    """Logs that can be changed."""

    summary: dict[str, Any]
    requests: list[RequestRecord]
    steps: list[StepRecord]
    switches: list[SwitchRecord]

    def violations(self, given: Workload | None = None, tiers: TierSet = TIERS) -> list[str]:
        return audit(
            self.summary,
            RequestTable.of(self.requests),
            StepTable.of(self.steps),
            self.switches,
            tiers=tiers,
            cost=cost_model(),
            workload=given,
        )


GIVEN = workload(seconds=6)


@pytest.fixture(scope="module")
def true_logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    path = tmp_path_factory.mktemp("run")
    found = run(path, GIVEN)
    steps = list(read_steps(path / "steps.jsonl"))
    return Logs(found.summary, list(read_requests(path / "requests.jsonl")), steps, list(found.switches))


@pytest.fixture
def logs(true_logs: Logs) -> Logs:
    return Logs(dict(true_logs.summary), true_logs.requests[:], true_logs.steps[:], true_logs.switches[:])


@pytest.mark.parametrize(
    ("first", "then", "rate"),
    [
        (MIXED, homogeneous(DEVICES, 1), 12),
        (homogeneous(DEVICES, 1), homogeneous(DEVICES, 4), 40),
        (SPLIT, homogeneous(DEVICES, 1), 12),
        (homogeneous(DEVICES, 1), SPLIT, 30),
    ],
    ids=["tp2 to tp1", "busy tp1 to tp4", "split to tp1", "busy tp1 to split"],
)
def test_true_logs_pass(first: Layout, then: Layout, rate: float, tmp_path: pathlib.Path) -> None:
    given = workload(rate, seconds=10)
    logs = run(tmp_path, given, first=first, then=then)
    assert len(logs.switches) == 1
    found = audit(
        logs.summary, logs.requests, logs.steps, logs.switches, tiers=TIERS, cost=cost_model(), workload=given
    )
    assert found == []


def test_true_logs_with_preemptions_pass(tmp_path: pathlib.Path) -> None:
    given = workload(20, seconds=10, prompt=200, output=500)
    cost = cost_model(kv_tokens=8000)
    logs = run(tmp_path, given, cost=cost)
    assert logs.summary["preemptions"] > 5
    for summary in (logs.summary, {k: v for k, v in logs.summary.items() if k != "preemptions"}):
        assert audit(summary, logs.requests, logs.steps, logs.switches, tiers=TIERS, cost=cost, workload=given) == []


def replace(items: list[Any], i: int, **changes: object) -> None:
    items[i] = dataclasses.replace(items[i], **changes)


def first(items: Sequence[Any], wanted: Callable[[Any], bool]) -> int:
    return next(i for i, item in enumerate(items) if wanted(item))


def slower(logs: Logs) -> None:
    replace(logs.steps, 50, end_s=logs.steps[50].end_s + 1e-4)


def faster(logs: Logs) -> None:
    replace(logs.steps, 50, end_s=logs.steps[50].end_s - 1e-4)


def two_at_once(logs: Logs) -> None:
    step = logs.steps[80]
    half = (step.end_s - step.start_s) / 2
    logs.steps.append(dataclasses.replace(step, start_s=step.start_s + half, end_s=step.end_s + half))


def in_a_stall(logs: Logs) -> None:
    i = first(logs.steps, lambda s: s.start_s > logs.switches[0].time_s + 0.5)
    replace(logs.switches, 0, stall_s=logs.steps[i].end_s - logs.switches[0].time_s)


def longer_context(logs: Logs) -> None:
    i = first(logs.steps, lambda s: s.decode_sequences > 0)
    replace(logs.steps, i, context_tokens=logs.steps[i].context_tokens + 2000)


def dropped_prefill(logs: Logs) -> None:
    del logs.steps[first(logs.steps, lambda s: len(s.prefill_tokens) == 1 and s.prefill_tokens[0] > 500)]


def dropped_decodes(logs: Logs) -> None:
    logs.steps[:] = [s for i, s in enumerate(logs.steps) if i % 50 or s.prefill_tokens]


def more_output(logs: Logs) -> None:
    replace(logs.requests, 3, output_tokens=logs.requests[3].output_tokens + 200)


def less_output(logs: Logs) -> None:
    for i, r in enumerate(logs.requests):
        replace(logs.requests, i, output_tokens=max(1, r.output_tokens - 5))


def flipped_met(logs: Logs) -> None:
    replace(logs.requests, 3, met=not logs.requests[3].met)


def earlier_first_token(logs: Logs) -> None:
    r = logs.requests[3]
    replace(logs.requests, 3, first_token_s=r.arrival_s + (r.first_token_s or 0) * 1e-4)


def before_arrival(logs: Logs) -> None:
    replace(logs.requests, 3, arrival_s=(logs.requests[3].first_token_s or 0) + 0.1)


def finish_before_first(logs: Logs) -> None:
    replace(logs.requests, 3, finish_s=(logs.requests[3].first_token_s or 0) - 0.01)


def finish_between_steps(logs: Logs) -> None:
    replace(logs.requests, 3, finish_s=(logs.requests[3].finish_s or 0) - 1e-3)


def twice(logs: Logs) -> None:
    logs.requests.append(logs.requests[3])


def lost(logs: Logs) -> None:
    del logs.requests[3]


def better_summary(logs: Logs) -> None:
    logs.summary["total"] = logs.summary["total"] | {"goodput": logs.summary["total"]["goodput"] + 0.01}


def missing_figure(logs: Logs) -> None:
    del logs.summary["utilisation"]


def no_devices(logs: Logs) -> None:
    logs.summary["devices"] = 0


def fewer_devices(logs: Logs) -> None:
    logs.summary["devices"] = 2


def wrong_tp(logs: Logs) -> None:
    replace(logs.steps, 5, tp=1)


def unknown_tp(logs: Logs) -> None:
    replace(logs.steps, 5, tp=3)


def moved_instance(logs: Logs) -> None:
    i = first(logs.steps, lambda s: s.devices == (0, 1))
    replace(logs.steps, i, devices=(2, 3))


def wrong_layout(logs: Logs) -> None:
    replace(logs.switches, 0, to_layout="tp4@0,1,2,3")


def broken_chain(logs: Logs) -> None:
    logs.switches.append(dataclasses.replace(logs.switches[0], time_s=logs.switches[0].time_s - 1))


def impossible_switch(logs: Logs) -> None:
    replace(logs.switches, 0, requeued=logs.switches[0].sequences + 1)


def crowd(logs: Logs) -> None:
    i = first(logs.steps, lambda s: s.decode_sequences > 0)
    replace(logs.steps, i, decode_sequences=logs.steps[i].decode_sequences + 30)


def empty_step(logs: Logs) -> None:
    replace(logs.steps, 5, decode_sequences=0, context_tokens=0, prefill_tokens=(), prefill_context=())


def too_much_kv(logs: Logs) -> None:
    i = first(logs.steps, lambda s: s.decode_sequences > 0)
    replace(logs.steps, i, context_tokens=10**7)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (slower, "but the profile says"),
        (faster, "but the profile says"),
        (two_at_once, "busy from"),
        (in_a_stall, "busy from"),
        (longer_context, "but the profile says"),
        (dropped_prefill, "prompt tokens were computed"),
        (dropped_prefill, "no instance of it ends a prefill"),
        (dropped_decodes, "were decoded, but outputs have"),
        (dropped_decodes, "output tokens were out, but"),
        (more_output, "but its instances made"),
        (less_output, "but outputs have only"),
        (flipped_met, "request "),
        (earlier_first_token, "no instance of it ends a prefill"),
        (before_arrival, "before its arrival"),
        (finish_before_first, "before its first token"),
        (finish_between_steps, "no instance of it ends a step"),
        (twice, "it is in the log 2 times"),
        (lost, "is not in the log"),
        (lost, "summary: total: requests is"),
        (better_summary, "summary: total: goodput is"),
        (missing_figure, "summary: utilisation is missing"),
        (no_devices, "must be above 0"),
        (fewer_devices, "not a set of the 2 devices"),
        (wrong_tp, "a step at TP 1"),
        (unknown_tp, "has no TP 3"),
        (moved_instance, "it changes its devices"),
        (wrong_layout, "are no instance of tp4@0,1,2,3"),
        (broken_chain, "was in force"),
        (broken_chain, "it stands behind"),
        (impossible_switch, "it has an impossible figure"),
        (crowd, "were there"),
        (empty_step, "it does nothing"),
        (too_much_kv, "hold 10000000 tokens of KV cache"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_wrong_is_found(corrupt: Callable[[Logs], None], message: str, logs: Logs) -> None:
    corrupt(logs)
    found = logs.violations(GIVEN)
    assert any(message in line for line in found), found
    assert all("\n" not in line for line in found)


def test_untouched_logs_pass(logs: Logs) -> None:
    assert logs.violations(GIVEN) == []


def test_tiers_of_another_run_are_found(logs: Logs) -> None:
    assert any("met is" in line for line in logs.violations(tiers=TierSet((Tier("chat", 1, 1), Tier("batch", 1, 1)))))
    found = logs.violations(tiers=TierSet((Tier("chat", 300, 12),)))
    assert "tier 'batch': it is not among the tiers of the run" in found


def test_many_of_a_kind_are_counted(logs: Logs) -> None:
    for i in range(len(logs.requests)):
        replace(logs.requests, i, met=not logs.requests[i].met)
    found = logs.violations()
    assert len(found) == 11
    assert found[-1] == f"... and {len(logs.requests) - 10} more like these"
