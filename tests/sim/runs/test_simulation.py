"""Runs of the driver: reproducible, audited, and honest about what a policy may know."""

import dataclasses
import pathlib
from collections.abc import Sequence

import pytest

from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import CountLate
from nitsum_jax.control.planning.decision import Decision, PlanInputs
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.sim.policies.baselines import Setting, adaptive
from nitsum_jax.sim.policies.rebalancing import AllOrNothing, RoleBalancer, RoleLimits, SwitchLimits
from nitsum_jax.sim.runs.audit import audit
from nitsum_jax.sim.runs.logs import LogFolder, read_folder
from nitsum_jax.sim.runs.metrics import measure, summary
from nitsum_jax.sim.runs.simulation import RunOutcome, RunPolicy, simulate
from nitsum_jax.sim.runs.summary import Figures, figures_of
from nitsum_jax.sim.runs.tables import RequestTable, StepTable
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload
from tests.sim.small_run import DEVICES, MIXED, SPLIT, TIERS, cost_model, workload

COST = cost_model()


class _InTurn:
    """Switches to one plan after the other."""

    interval_s = 1.0

    def __init__(self, plans: Sequence[Layout]):
        self._plans = list(plans)
        self.heard: list[tuple[str, float]] = []

    def arrived(self, now_s: float, job: JobView) -> None:
        self.heard.append(("arrived", now_s))

    def finished(self, now_s: float, job: JobView) -> None:
        self.heard.append(("finished", now_s))

    def urgent(self, now_s: float, count_late: CountLate) -> bool:
        return False

    def tick(self, now_s: float, view: CellView) -> Decision | None:
        if not self._plans:
            return None
        plan = self._plans.pop(0)
        inputs = PlanInputs(now_s, view.plan, view.num_devices, view.lost, ())
        return Decision(now_s, inputs, (), plan, plan != view.plan, "its turn")


def _policies(cost: CostModel, resident_tp: int | None = 1) -> dict[str, RunPolicy]:
    tiers = TIERS
    setting = Setting(cost, tiers, DEVICES)
    plans = [SPLIT, homogeneous(DEVICES, 4), homogeneous(DEVICES, 1), SPLIT, MIXED]
    roles = Layout(tuple(InstanceSpec((d,), Role.PREFILL if d < 2 else Role.DECODE) for d in range(DEVICES)))
    return {
        "in turn": RunPolicy("in turn", MIXED, controller=lambda: _InTurn(plans), resident_tp=resident_tp),
        "adaptive": adaptive(setting),
        "dynamo": RunPolicy("dynamo", roles, controller=lambda: RoleBalancer(cost, tiers, RoleLimits(0.5, 0.3, 0.9))),
        "flying": RunPolicy(
            "flying",
            homogeneous(DEVICES, 4),
            controller=lambda: AllOrNothing(homogeneous(DEVICES, 1), homogeneous(DEVICES, 4), SwitchLimits(0.5, 3, 1)),
            resident_tp=resident_tp,
        ),
    }


def _run(policy: RunPolicy, work: Workload, folder: pathlib.Path, cost: CostModel = COST) -> RunOutcome:
    with LogFolder(folder) as log:
        return simulate(work, TIERS, cost, policy, num_devices=DEVICES, log=log)


@pytest.mark.parametrize("name", ["in turn", "adaptive", "dynamo", "flying"])
@pytest.mark.parametrize("kv_tokens", [None, 4000], ids=["roomy", "cramped"])
def test_logs_of_policies_that_switch_pass_the_audit(name: str, kv_tokens: int | None, tmp_path: pathlib.Path) -> None:
    cost = cost_model(kv_tokens)
    work = workload(rate=25.0, seconds=12.0, prompt=400)
    outcome = _run(_policies(cost, 1 if kv_tokens is None else None)[name], work, tmp_path, cost)
    assert len(outcome.finished) + len(outcome.failed) == len(work.requests)
    if name == "in turn":
        assert len(outcome.switches) >= 4
    with LogFolder(tmp_path / "none"):
        pass
    (tmp_path / "summary.json").write_text("{}")
    logs = read_folder(tmp_path)
    metrics = measure(logs.requests, TIERS, work.seconds, steps=logs.steps, switches=logs.switches, devices=DEVICES)
    about = summary(metrics, TIERS, policy=name, devices=DEVICES, preemptions=outcome.preemptions)
    assert audit(about, logs.requests, logs.steps, logs.switches, tiers=TIERS, cost=cost, workload=work) == []
    # Goodput follows from the request log alone, and is what the run itself counted.
    assert metrics.total.met == outcome.met
    assert metrics.total.goodput == pytest.approx(outcome.goodput)
    assert isinstance(logs.requests, RequestTable)
    assert isinstance(logs.steps, StepTable)


@pytest.mark.parametrize("name", ["in turn", "adaptive"])
def test_the_same_run_gives_the_same_bytes(name: str, tmp_path: pathlib.Path) -> None:
    for folder in ("a", "b"):
        _run(_policies(COST)[name], workload(seconds=10.0), tmp_path / folder)
    for log in ("requests", "steps", "switches", "decisions"):
        first = (tmp_path / "a" / f"{log}.jsonl").read_bytes()
        assert first == (tmp_path / "b" / f"{log}.jsonl").read_bytes()
    assert first


def test_requests_that_no_instance_can_hold_fail(tmp_path: pathlib.Path) -> None:
    cost = cost_model(1000)
    work = Workload((TraceRequest(0.0, 3000, 5, "chat"), TraceRequest(0.1, 300, 5, "chat")), "one too large", 1.0)
    outcome = _run(RunPolicy("p", MIXED), work, tmp_path, cost)
    assert [job.id for job in outcome.failed] == ["0"]
    assert [job.id for job in outcome.finished] == ["1"]
    assert outcome.attainment == 0.5
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == 2


def test_without_a_log_the_run_is_the_same(tmp_path: pathlib.Path) -> None:
    policy = _policies(COST)["in turn"]
    logged = _run(policy, workload(), tmp_path)
    silent = simulate(workload(), TIERS, COST, policy, num_devices=DEVICES)
    assert figures_of(silent, DEVICES) == figures_of(logged, DEVICES)


def test_figures_add_up_and_survive_json() -> None:
    outcome = simulate(workload(seconds=90.0, rate=6.0), TIERS, COST, RunPolicy("p", MIXED), num_devices=DEVICES)
    figures = figures_of(outcome, DEVICES)
    assert figures.offered == sum(came for came, _ in figures.windows) == len(outcome.finished)
    assert figures.met == sum(met for _, met in figures.windows) == sum(t["met"] for t in figures.tiers.values())
    assert len(figures.windows) == 2
    assert 0 < figures.utilisation < 1
    assert figures.goodput == pytest.approx(figures.attainment * figures.rate)
    assert Figures.from_json(figures.to_json()) == figures


def test_compiling_comes_before_a_switch_and_once() -> None:
    one, two = homogeneous(DEVICES, 4), homogeneous(DEVICES, 1)

    def policy() -> RunPolicy:
        return RunPolicy("p", MIXED, controller=lambda: _InTurn([one, MIXED, one, two] * 3))

    warm = simulate(workload(), TIERS, COST, policy(), num_devices=DEVICES)
    cold = simulate(workload(), TIERS, COST, policy(), num_devices=DEVICES, compile_s=3.0)
    waits = [report.time_s - report.asked_s for report in cold.switches]
    assert len(warm.switches) == len(cold.switches) == 12
    assert sum(wait >= 3.0 for wait in waits) == 2  # each group of devices once, those of the first plan never
    assert all(report.time_s - report.asked_s < 1.0 for report in warm.switches)


def test_controllers_hear_of_everything_in_order() -> None:
    controller = _InTurn([])
    work = workload()
    simulate(work, TIERS, COST, RunPolicy("p", MIXED, controller=lambda: controller), num_devices=DEVICES)
    assert [what for what, _ in controller.heard].count("arrived") == len(work.requests)
    assert [what for what, _ in controller.heard].count("finished") == len(work.requests)
    times = [time_s for _, time_s in controller.heard]
    assert times == sorted(times)


def test_policies_do_not_see_output_lengths() -> None:
    """Requests whose outputs will be long are treated as any others until they are."""
    work = workload(rate=4.0, seconds=5.0)
    long = dataclasses.replace(work, requests=tuple(dataclasses.replace(r, output_tokens=5000) for r in work.requests))
    first = {
        name: simulate(given, TIERS, COST, RunPolicy("p", MIXED), num_devices=DEVICES).finished
        for name, given in (("short", work), ("long", long))
    }
    expected = {name: {job.id: job.expected_output for job in jobs} for name, jobs in first.items()}
    assert expected["long"]["0"] == expected["short"]["0"] == 128.0


def test_hopeless_runs_are_given_up() -> None:
    work = workload(rate=400.0, seconds=30.0)
    whole = simulate(work, TIERS, COST, RunPolicy("p", MIXED), num_devices=DEVICES)
    cut = simulate(work, TIERS, COST, RunPolicy("p", MIXED), num_devices=DEVICES, most_missed=len(work.requests) // 3)
    assert cut.given_up
    assert cut.end_s < whole.end_s
    assert figures_of(cut, DEVICES).attainment >= whole.attainment
    fine = simulate(workload(), TIERS, COST, RunPolicy("p", MIXED), num_devices=DEVICES, most_missed=len(work.requests))
    assert not fine.given_up


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (homogeneous(8, 8), "has no TP 8"),
        (Layout((InstanceSpec((0, 1)), InstanceSpec((1, 2)))), "does not fit 4 devices"),
        (Layout((InstanceSpec((4,)),)), "does not fit 4 devices"),
        (Layout(()), "the plan has no instances"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: Layout, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        simulate(workload(), TIERS, COST, RunPolicy("p", plan), num_devices=DEVICES)


def test_unknown_tiers_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="unknown tier"):
        simulate(workload(), TierSet((TIERS.tiers[0],)), COST, RunPolicy("p", MIXED), num_devices=DEVICES)
