"""Scheduling by tiers over real instances and sequences, under a virtual clock and a profile's step times."""

import collections
import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nitsum_jax.control.job import met
from nitsum_jax.control.model.cell import CellModel, Recorder
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.planning.cell_view import CellView, JobView
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import Tier, TierSet
from nitsum_jax.engine.batching.waiting import FifoPolicy
from nitsum_jax.engine.instance import Instance
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.policy import Policy, SeatTest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.dispatched import Step
from nitsum_jax.errors import OverloadedError
from nitsum_jax.meshes.layout import InstanceSpec, Layout, parse_layout
from nitsum_jax.profiles.library import load_profile
from nitsum_jax.runtime.scheduling.tiered import TieredScheduling
from tests.runtime.fake_cell import FakeCell

COST = CostModel(load_profile("qwen2.5-32b-h200"))
TIERS = TierSet((Tier("tight", 500, 15), Tier("relaxed", 10_000, 200)))
Wanted = tuple[float, int, int, str]  # arrival, prompt, output, tier


def load(rate: float, seconds: float, seed: int = 3) -> list[Wanted]:
    """Poisson arrivals: chats and long prompts with short answers."""
    rng = random.Random(seed)
    requests: list[Wanted] = []
    now = 0.0
    while now < seconds:
        now += rng.expovariate(rate)
        if rng.random() < 0.6:
            requests.append((now, rng.randint(200, 1500), rng.randint(50, 200), "tight"))
        else:
            requests.append((now, rng.randint(500, 2500), rng.randint(20, 60), "relaxed"))
    return requests


def tiered(clock: Callable[[], float]) -> Policy:
    return TieredScheduling(TIERS, COST, 10_000, clock=clock)


class Outcome:
    """Runs requests and counts those that met both targets, by the engine's times."""

    def __init__(self, policy_of: Callable[[Callable[[], float]], Policy], requests: Sequence[Wanted], **cell: Any):
        self.met: collections.Counter[str] = collections.Counter()
        self.ended: collections.Counter[str] = collections.Counter()
        self.cell = FakeCell(policy_of, COST, cell.get("layout", "tp2x4"), cell.get("blocks", 40_000))
        first: dict[str, float] = {}
        policy: Any = self.cell.policy
        told_first, told_end = policy.first_token, policy.ended

        def first_token(sequence: LiveRequest, now_s: float) -> None:
            first[sequence.request.id] = now_s
            told_first(sequence, now_s)

        def ended(sequence: LiveRequest, now_s: float) -> None:
            name = sequence.request.tier
            self.ended[name] += 1
            output = len(sequence.tokens) - sequence.prompt_len
            assert output == sequence.request.max_tokens
            self.met[name] += met(TIERS.get(name), sequence.arrival_s, first[sequence.request.id], now_s, output)
            told_end(sequence, now_s)

        policy.first_token, policy.ended = first_token, ended
        for request in requests:
            self.cell.add(*request)
        self.cell.run()
        assert not self.cell.alive
        assert sum(self.ended.values()) == len(requests)
        for instance in self.cell.instances:
            assert not instance.rows
            assert instance.free_pages() == instance.total_pages()

    def attainment(self, tier: str) -> float:
        return self.met[tier] / self.ended[tier]


def simulated(requests: Sequence[Wanted], layout: str = "tp2x4") -> dict[str, float]:
    """Attainment by the model of the cell."""
    met_, ended = collections.Counter[str](), collections.Counter[str]()

    class Tally(Recorder):
        def finished(self, job: ModelJob) -> None:
            ended[job.tier.name] += 1
            met_[job.tier.name] += job.met()

        def failed(self, job: ModelJob, reason: str) -> None:
            raise AssertionError(reason)

    plan = Layout(tuple(InstanceSpec(i.devices) for i in parse_layout(layout, 8).instances))
    cell = CellModel(COST, Scheduler(COST, tuple(TIERS)), plan, recorder=Tally(), max_batch=64)
    for number, (at_s, prompt, output, tier) in enumerate(requests):
        cell.run_until(at_s)
        cell.add(ModelJob(str(number), TIERS.get(tier), at_s, prompt, output))
    cell.run_until(float("inf"))
    return {tier: met_[tier] / ended[tier] for tier in ended}


def test_a_load_that_the_cell_can_bear_meets_all_targets_where_first_come_first_served_does_not() -> None:
    requests = load(24, 6)
    outcome = Outcome(tiered, requests)
    assert outcome.attainment("tight") > 0.98
    assert outcome.attainment("relaxed") > 0.98
    assert Outcome(lambda clock: FifoPolicy(10_000), requests).attainment("tight") < 0.9


def test_overload_demotes_and_agrees_with_the_model_of_the_cell() -> None:
    requests = load(60, 4)  # about twice what the cell can bear
    outcome, expected = Outcome(tiered, requests), simulated(requests)
    assert outcome.attainment("tight") == pytest.approx(expected["tight"], abs=0.05)
    assert outcome.attainment("tight") > 0.9  # the tight tier keeps its goodput, and all others end too


def test_who_runs_out_of_blocks_is_sent_back_and_ends_all_the_same() -> None:
    outcome = Outcome(tiered, load(20, 3), layout="tp1x8", blocks=3200)  # 400 pages, 6400 tokens, of an instance
    assert sum(outcome.ended.values()) > 40


def test_instances_that_are_kept_for_a_tier_take_others_only_when_it_can_wait() -> None:
    seen = collections.defaultdict(set)

    def policy_of(clock: Callable[[], float]) -> Policy:
        scheduling = TieredScheduling(TIERS, COST, 100, clock=clock)
        scheduling.keep_for(
            Layout((InstanceSpec((0, 1, 2, 3), tiers=("tight",)), InstanceSpec((4, 5, 6, 7), tiers=("relaxed",))))
        )
        seated = scheduling.seated

        def note(sequence: LiveRequest, instance: Instance, now_s: float) -> None:
            seen[sequence.request.tier].add(instance.spec.devices[0])
            seated(sequence, instance, now_s)

        scheduling.seated = note  # type: ignore[method-assign]
        return scheduling

    outcome = Outcome(policy_of, load(4, 5), layout="tp4x2")
    assert isinstance(outcome.cell.policy, TieredScheduling)
    assert [plan.tiers for plan in outcome.cell.policy.plan().instances] == [("tight",), ("relaxed",)]
    assert seen == {"tight": {0}, "relaxed": {4}}


def _held(there: object, sequence: LiveRequest, instance: object) -> int:
    del sequence
    return 60 if instance is there else 0


@pytest.mark.parametrize("policy_of", [tiered, lambda clock: FifoPolicy(100)], ids=["tiered", "fifo"])
def test_a_request_goes_where_its_beginning_lies(policy_of: Callable[[Callable[[], float]], Policy]) -> None:
    for there in range(4):
        cell = FakeCell(policy_of, COST, "tp2x4", 40_000)
        test = SeatTest(
            fits=lambda sequence, instance: True,
            held=functools.partial(_held, cell.instances[there]),
        )
        cell._arrive(Request("a", (1,) * 1000, 5, tier="tight"))
        cell.policy.arrivals(0.0)
        choice = cell.policy.next(cell.instances, test, 0.0)
        assert choice is not None
        assert choice[1] is cell.instances[there]


def test_the_queue_is_bounded_and_counts_who_waits() -> None:
    scheduling = TieredScheduling(TIERS, COST, 2)
    cell = FakeCell(lambda clock: scheduling, COST, "tp8", 4000)
    cell._arrive(_request("a"))
    cell._arrive(_request("b"))
    with pytest.raises(OverloadedError, match="2 requests wait already"):
        cell._arrive(_request("c"))
    assert len(scheduling) == 2


def _request(name: str) -> Request:
    return Request(name, (1,) * 10, 5, tier="tight")


@pytest.mark.parametrize("fused", [True, False])
def test_the_last_chunk_of_a_round_shares_its_step_with_decoding_where_steps_can_do_both(fused: bool) -> None:
    cost = CostModel(dataclasses.replace(COST.profile, mixed_steps=fused))
    scheduling = TieredScheduling(TIERS, cost, 100)
    cell = FakeCell(lambda clock: scheduling, cost, "tp8", 4000)
    (instance,) = cell.instances
    instance.depth = 1
    order: list[str] = []
    launched = scheduling.launched

    def note(at: Instance, step: Step, now_s: float) -> None:
        chunk = "" if step.chunk is None else f"chunk {step.chunk[0]}"
        order.append(" and ".join(filter(None, [chunk, f"{step.decoding} decode" if step.decoding else ""])))
        launched(at, step, now_s)

    scheduling.launched = note  # type: ignore[method-assign, assignment]
    cell.add(0.0, 300, 6, "tight")
    cell.add(0.02, 700, 2, "tight")
    cell.run()
    assert order[0] == "chunk 300"
    begun = order.index("chunk 512")
    assert order[begun - 1] == "1 decode"
    shared = ["chunk 512", "chunk 188 and 1 decode"] if fused else ["chunk 512", "chunk 188", "2 decode"]
    assert order[begun : begun + len(shared)] == shared
    assert sum("decode" in step for step in order) == 5  # the second request got its other token with one of the first


def test_who_comes_with_a_switch_to_an_instance_that_only_prefills_does_not_slow_its_prompts() -> None:
    scheduling = TieredScheduling(TIERS, COST, 100)
    cell = FakeCell(lambda clock: scheduling, COST, "tp4:prefill+tp4:decode", 4000)
    cell.add(0.0, 300, 50, "tight")
    cell.run()  # nobody hands over: it stays where it was prefilled
    before, decoder = cell.instances
    successor = FakeCell(lambda clock: scheduling, COST, "tp4:prefill+tp4:decode", 4000).instances[0]
    successor.rows, before.rows = before.rows, {}
    for sequence in successor.rows.values():
        sequence.home = successor
    scheduling.relaid([successor, decoder], 1.0)
    here, there = scheduling.view(8).workers
    assert (here.jobs, here.decoding, there.jobs) == (1, 0, 0)  # it waits to go on
    (sequence,) = successor.rows.values()
    scheduling.moved(sequence, successor, decoder)
    here, there = scheduling.view(8).workers
    assert (here.jobs, there.decoding) == (0, 1)


def test_what_other_threads_are_given_of_requests_and_instances_does_not_change_any_more() -> None:
    cell: FakeCell
    scheduling = TieredScheduling(TIERS, COST, 100, clock=lambda: cell.now_s)
    views: list[CellView] = []
    told: list[JobView] = []

    def arrived(now_s: float, job: JobView) -> None:
        told.append(job)
        views.append(scheduling.view(8))

    scheduling.arrived_listeners.append(arrived)
    scheduling.finished_listeners.append(lambda _, job: told.append(job))
    cell = FakeCell(lambda clock: scheduling, COST, "tp8", 4000)
    cell.add(0.0, 300, 50, "tight")
    cell.run()
    came, ended = told
    (view,) = views
    assert (came.generated, ended.generated, ended.met) == (0, 50, True)
    assert [job.id for job in view.waiting] == [came.id]  # as it was when it came, though it has ended by now
    assert (view.backlog, view.backlog_tokens, scheduling.view(8).backlog) == (1, 300, 0)
    assert hash(view) == hash(dataclasses.replace(view))  # all of it is immutable
