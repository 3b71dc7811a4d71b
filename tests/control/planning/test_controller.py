"""The control loop without its clock, in the model of a cell: it follows the load."""

import itertools
import random
from collections.abc import Collection

import pytest

from nitsum_jax.control.model.cell import ModelWorker, Recorder
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import Switched, SwitchingCell
from nitsum_jax.control.plan import homogeneous
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.planning.controller import AdaptiveController, ControllerConfig
from nitsum_jax.control.planning.decision import Decision, PlanInputs
from nitsum_jax.control.scheduling.backlog import Backlog
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier
from nitsum_jax.meshes.layout import Layout
from tests.control.profiles import roofline_profile

COST = CostModel(roofline_profile())
CHAT, CODE = Tier("chat", ttft_ms=300, tpot_ms=4), Tier("code", ttft_ms=2000, tpot_ms=100)


def nobody(ids: Collection[str]) -> int:
    return 0


class Run(Recorder):
    """A cell under a load, with a controller or without."""

    def __init__(self, first: Layout, controller: AdaptiveController | None):
        self.met = self.ended = 0
        self.switches: list[Switched] = []
        self.scheduler: Scheduler[ModelJob, ModelWorker] = Scheduler(COST, (CHAT, CODE))
        resident = controller.planner.resident_tp if controller else None
        self.cell = SwitchingCell(COST, self.scheduler, first, recorder=self, resident_tp=resident)
        self.cell.on_switch = self.switches.append
        self.controller = controller
        if controller:
            self.cell.on_finish = lambda job: controller.finished(self.cell.now_s, JobView.of(job))

    def finished(self, job: ModelJob) -> None:
        self.ended += 1
        self.met += job.met()

    def failed(self, job: ModelJob, reason: str) -> None:
        raise AssertionError(reason)

    def tick(self, now_s: float) -> None:
        assert self.controller
        view = CellView.of(self.cell.plan, 8, self.cell.workers, self.scheduler.backlog)
        decision = self.controller.tick(now_s, view)
        if decision and decision.switch:
            self.cell.switch(decision.choice)

    def count_late(self, ids: Collection[str]) -> int:
        return sum(self.cell.alive[name].late for name in ids if name in self.cell.alive)

    def play(self, arrivals: list[tuple[float, Tier, int, int]]) -> None:
        tick_s = 0.0
        for i, (time_s, tier, prompt, output) in enumerate(arrivals):
            if self.controller:
                while (tick_s := tick_s + self.controller.interval_s) <= time_s:
                    self.cell.run_until(tick_s)
                    self.tick(tick_s)
                tick_s -= self.controller.interval_s
            self.cell.run_until(time_s)
            if self.controller and self.controller.urgent(time_s, self.count_late):
                self.tick(time_s)
            job = ModelJob(str(i), tier, time_s, prompt, output)
            if self.controller:
                self.controller.arrived(time_s, JobView.of(job))
            self.cell.add(job)
        self.cell.run_until(float("inf"))


def shifting(seconds: float = 20) -> list[tuple[float, Tier, int, int]]:
    """Chat with tight targets first, then long prompts that can wait."""
    generator = random.Random(3)
    arrivals = []
    for start, chat, code in ((0.0, 110.0, 1.0), (seconds, 1.0, 90.0)):
        for tier, rate, prompt, output in ((CHAT, chat, 600, 150), (CODE, code, 3000, 20)):
            time_s = start
            while (time_s := time_s + generator.expovariate(rate)) < start + seconds:
                wide = generator.randint(50, 150) / 100
                arrivals.append((time_s, tier, int(prompt * wide), int(output * generator.randint(50, 150) / 100)))
    return sorted(arrivals, key=lambda arrival: arrival[0])


def test_adaptive_control_meets_more_than_any_homogeneous_layout_when_the_mix_shifts() -> None:
    arrivals = shifting()
    static = {}
    for tp in (1, 2, 4, 8):
        run = Run(homogeneous(8, tp), None)
        run.play(arrivals)
        static[tp] = run.met / len(arrivals)
    adaptive = Run(homogeneous(8, 4), AdaptiveController(COST, (CHAT, CODE)))
    adaptive.play(arrivals)
    assert adaptive.ended == len(arrivals)  # nothing is lost in the switches
    assert adaptive.switches
    assert adaptive.met / len(arrivals) > max(static.values()), static


def test_it_waits_until_it_knows_something() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE), config=ControllerConfig(warm_up_s=20))
    run = Run(homogeneous(8, 1), controller)
    run.play([arrival for arrival in shifting() if arrival[0] < 19])
    assert not run.switches


def test_misses_bring_the_next_tick_on() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE))
    for i in range(20):
        job = ModelJob(str(i), CHAT, 0.0, 100, 10, generated=10, first_token_s=5.0, finish_s=6.0)
        controller.arrived(6.0, JobView.of(job))
        controller.finished(6.0, JobView.of(job))
    assert controller.urgent(6.0, nobody)
    controller.tick(6.0, CellView(homogeneous(8, 1), 8))
    assert not controller.urgent(6.5, nobody)


def test_requests_that_are_given_up_bring_the_next_tick_on() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE))
    for i in range(20):
        controller.arrived(6.0, JobView.of(ModelJob(str(i), CHAT, 6.0, 100, 10)))
    late: set[str] = set()

    def count_late(ids: Collection[str]) -> int:
        return len(late.intersection(ids))

    assert not controller.urgent(6.0, count_late)
    late.update(map(str, range(5)))
    assert not controller.urgent(6.1, count_late)  # it looks a few times a second
    assert controller.urgent(6.5, count_late)


def test_at_high_rates_those_that_came_a_second_ago_are_looked_at() -> None:
    """500 requests/s, late after 0.3 s: of the last 64 none can be."""
    controller = AdaptiveController(COST, (CHAT, CODE))
    for i in range(500):
        controller.arrived(6.0 + i / 500, JobView.of(ModelJob(str(i), CHAT, 6.0, 100, 10)))
    assert controller.urgent(7.0, lambda ids: sum(int(name) < 350 for name in ids))
    calm = AdaptiveController(COST, (CHAT, CODE))
    for i in range(100):  # 20/s: what came long ago says nothing of now
        calm.arrived(2.0 + i / 20, JobView.of(ModelJob(str(i), CHAT, 2.0, 100, 10)))
    assert not calm.urgent(7.0, lambda ids: sum(int(name) < 36 for name in ids))


def test_who_was_late_and_has_ended_still_counts() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE), config=ControllerConfig(urgent_share=0.2))
    jobs = [ModelJob(str(i), CHAT, 6.0, 100, 10, first_token_s=6.1, finish_s=6.1, late=i < 3) for i in range(20)]
    for job in jobs:
        controller.arrived(6.0, JobView.of(job))
    for job in jobs[:3]:
        controller.finished(6.2, JobView.of(job))
    assert not controller.urgent(6.5, nobody)
    assert controller.urgent(7.0, lambda ids: 2)  # 3 of 20 that have ended, 2 that are there


def test_a_change_of_the_load_brings_the_next_tick_on() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE))
    view = CellView(homogeneous(8, 1), 8)
    for i in range(100):
        controller.arrived(i / 5, JobView.of(ModelJob(f"a{i}", CHAT, i / 5, 100, 10)))
    controller.tick(20.0, view)
    urgent_s = []
    for i in range(200):
        now_s = 20 + i / 50
        controller.arrived(now_s, JobView.of(ModelJob(f"b{i}", CHAT, now_s, 100, 10)))
        if controller.urgent(now_s, nobody):
            urgent_s.append(now_s)
    assert urgent_s
    assert urgent_s[0] < 24


def test_an_event_within_the_dwell_time_is_seen_after_it() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE), config=ControllerConfig(warm_up_s=10.0))
    for i in range(20):
        job = ModelJob(str(i), CHAT, 0.0, 100, 10, generated=10, first_token_s=5.0, finish_s=6.0)
        controller.arrived(6.0, JobView.of(job))
        controller.finished(6.0, JobView.of(job))
    view = CellView(homogeneous(8, 1), 8)
    assert controller.tick(6.0, view) is None  # too early for a decision
    assert controller.urgent(10.0, nobody)
    assert controller.tick(10.0, view) is not None
    assert not controller.urgent(11.5, nobody)


def test_the_planner_is_told_how_many_requests_an_instance_holds() -> None:
    controller = AdaptiveController(COST, (CHAT, CODE))
    plan = homogeneous(8, 4)
    backlog: Backlog[ModelJob] = Backlog()
    workers = [ModelWorker(i, instance, 100_000, 16, 32) for i, instance in enumerate(plan.instances)]
    view = CellView.of(plan, 8, workers, backlog)
    assert controller.inputs(1.0, view).max_batch == 32


def test_who_has_planned_a_lot_is_thrifty_until_the_load_changes() -> None:
    asked: list[PlanInputs] = []
    work = 600

    def decide(inputs: PlanInputs) -> Decision:
        asked.append(inputs)
        return Decision(inputs.time_s, inputs, (), inputs.plan, False, "stays", work=50 if inputs.thrifty else work)

    config = ControllerConfig(work_rate=100.0, work_saved=1800.0, work_owed=2000.0)
    controller = AdaptiveController(COST, (CHAT, CODE), config=config, decide=decide)
    view = CellView(homogeneous(8, 1), 8)

    def play(start_s: float, rate: int, seconds: int) -> None:
        for i in range(rate * seconds):
            now_s = start_s + i / rate
            job = ModelJob(f"{now_s}", CHAT, now_s - 5, 100, 10, generated=10, first_token_s=now_s - 1, finish_s=now_s)
            controller.arrived(now_s, JobView.of(job))
            controller.finished(now_s, JobView.of(job))  # it missed its target, as they all do
            if controller.urgent(now_s, nobody) or i % (5 * rate) == 0:
                controller.tick(now_s, view)

    play(0.0, 20, 120)
    whole = [inputs.time_s for inputs in asked if not inputs.thrifty]
    assert whole[1] - whole[0] < 2  # what was saved is spent at once
    assert len(whole) * 600 <= 1800 + 120 * 100 + 600
    assert len(whole) > 10  # but it goes on at the rate that is allowed
    pauses = [after.time_s - before.time_s for before, after in itertools.pairwise(asked)]
    assert max(pauses) <= 5.0 + 1e-9  # and between these looks at the estimate at every interval
    asked.clear()
    work = 10_000
    play(120.0, 200, 4)
    assert any(inputs.time_s < 123.0 and not inputs.thrifty for inputs in asked)  # a change is planned for in full
    asked.clear()
    play(124.0, 200, 30)
    assert any(inputs.time_s < 150.0 and not inputs.thrifty for inputs in asked)  # but it leaves no debt of minutes


def test_replays_are_made_of_what_came_since_the_load_changed() -> None:
    batch = Tier("batch", ttft_ms=60_000, tpot_ms=1000)  # nobody uses it, which says nothing of the others
    controller = AdaptiveController(COST, (CHAT, CODE, batch))
    view = CellView(homogeneous(8, 1), 8)
    for i in range(100):
        controller.arrived(i / 5, JobView.of(ModelJob(f"a{i}", CHAT, i / 5, 100, 10)))
    for i in range(400):
        now_s = 20 + i / 50
        controller.arrived(now_s, JobView.of(ModelJob(f"b{i}", CODE, now_s, 3000, 10)))
    inputs = controller.inputs(28.0, view)
    before = [arrival.tier for arrival in inputs.recent if arrival.time_s < 20]
    # Only chat came then; those since the change (and from the second in which it was found) stand there again.
    assert before.count("code") > 0.9 * len(before)
    assert [a.time_s for a in inputs.recent] == sorted(a.time_s for a in inputs.recent)


@pytest.mark.parametrize("dwell_s", [10.0, 1000.0])
def test_two_switches_are_at_least_the_dwell_time_apart(dwell_s: float) -> None:
    controller = AdaptiveController(COST, (CHAT, CODE), config=ControllerConfig(dwell_s=dwell_s))
    run = Run(homogeneous(8, 1), controller)
    run.play(shifting(25))
    times = [switch.asked_s for switch in run.switches]
    assert all(later - earlier >= dwell_s for earlier, later in itertools.pairwise(times))
