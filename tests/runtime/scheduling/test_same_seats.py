"""The same switch seats the same sequences in the running engine and in the model of a cell."""

import collections
import dataclasses
import types
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.model.switching import SwitchingCell
from nitsum_jax.control.plan import DECODE, PREFILL, Shape, partitions, place
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.kv.kv_pool import BlockAllocator
from nitsum_jax.engine.live_request import LiveRequest
from nitsum_jax.engine.request import Request
from nitsum_jax.engine.switching.migration import Destination, Leaving, plan_moves
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.runtime.scheduling.tiered import TieredScheduling
from tests.control.cells import TIERS, Steps, small_cost
from tests.runtime.fake_cell import PAGE, FakeInstance

DEVICES = 8
PAGES = 600  # of a device alone: room for all of any example, twice
COST = small_cost(PAGES * PAGE)
Group = tuple[tuple[int, ...], Role]


@dataclasses.dataclass(frozen=True)
class Live:
    """A request in mid-flight: `generated` is 0 while its prompt is being computed."""

    name: str
    tier: str
    instance: int
    prompt: int
    cached: int
    generated: int
    late: bool


@dataclasses.dataclass(frozen=True)
class Switch:
    """Requests on a plan, and the plan that is to come."""

    before: Layout
    after: Layout
    rows: int
    requests: list[Live]


def plans() -> st.SearchStrategy[Layout]:
    roles = st.sampled_from([(), ("chat",), ("code",)])

    def of(cut: tuple[int, ...], prefills: int, kept: list[tuple[str, ...]]) -> Layout:
        if 0 < prefills < len(cut):
            return place([Shape(tp, PREFILL if i < prefills else DECODE) for i, tp in enumerate(cut)], DEVICES)
        return place([Shape(tp, "mixed", tiers) for tp, tiers in zip(cut, kept, strict=False)], DEVICES)

    cuts = st.sampled_from(list(partitions(DEVICES, (1, 2, 4, 8))))
    return st.builds(of, cuts, st.integers(0, 4), st.lists(roles, min_size=8, max_size=8))


@st.composite
def switches(draw: st.DrawFn) -> Switch:
    before, after = draw(plans()), draw(plans())
    requests = []
    for number in range(draw(st.integers(1, 10))):
        instance = draw(st.integers(0, len(before.instances) - 1))
        prompt = draw(st.integers(1, 900))
        done = before.instances[instance].role == DECODE or draw(st.booleans())
        generated = draw(st.integers(1, 60)) if done else 0
        cached = prompt + generated - 1 if done else draw(st.integers(0, prompt - 1))
        tier = draw(st.sampled_from(["chat", "code"]))
        requests.append(Live(str(number), tier, instance, prompt, cached, generated, draw(st.booleans())))
    return Switch(before, after, draw(st.integers(1, 6)), requests)


class _NotingCell(SwitchingCell):
    """Records which requests are sent back: the backlog may seat them again at once."""

    def send_back(self, job: ModelJob) -> None:
        self.__dict__.setdefault("sent_back", set()).add(job.id)
        super().send_back(job)


def seats_of_the_model(switch: Switch) -> dict[str, Group | None]:
    cell = _NotingCell(COST, Scheduler(COST, TIERS), switch.before, recorder=Steps(), max_batch=switch.rows)
    jobs = []
    for one in switch.requests:
        job = ModelJob(one.name, TierSet(TIERS).get(one.tier), 0.0, one.prompt, 1000, late=one.late)
        job.cached, job.generated = one.cached, one.generated
        jobs.append(job)
        worker = cell.workers[one.instance]
        if not one.generated:
            worker.seat(job)
            continue
        job.first_token_s = 0.0
        if worker.plan.role == PREFILL:
            worker.park(job)
        else:
            worker.reserve(job)
            worker.arrive(job)
    gone = {job.id for job in jobs if _leaves(switch, _plan_of(cell, job))}
    assert cell.switch(switch.after)
    sent_back = cell.__dict__.get("sent_back", set())
    assert all(worker.plan.role == PREFILL for worker in cell.workers if worker.outgoing)
    return {
        job.id: None if job.id in sent_back or (plan := _plan_of(cell, job)) is None else plan.group
        for job in jobs
        if job.id in gone
    }


def _plan_of(cell: SwitchingCell, job: ModelJob) -> InstanceSpec | None:
    return next((worker.plan for worker in cell.workers if worker is job.worker), None)


def _leaves(switch: Switch, plan: InstanceSpec | None) -> bool:
    assert plan is not None
    return plan.group not in {instance.group for instance in switch.after.instances}


def seats_of_the_engine(switch: Switch) -> dict[str, Group | None]:
    allocators = [BlockAllocator(PAGES * DEVICES) for _ in range(DEVICES)]
    policy = TieredScheduling(TierSet(TIERS), COST, 100, clock=lambda: 0.0)
    instances = [
        FakeInstance(dataclasses.replace(plan, tiers=()), allocators, DEVICES, 4096 // PAGE)
        for plan in switch.before.instances
    ]
    for one in switch.requests:
        request = Request(one.name, (1,) * one.prompt, 1000, tier=one.tier)
        page_table = np.zeros((DEVICES, 4096 // PAGE), np.int32)
        sequence = LiveRequest(request, 0, [1] * (one.prompt + one.generated), page_table, 4096, arrival_s=0.0)
        policy.push(sequence)
        policy.arrivals(0.0)
        sequence.target, sequence.cached = one.prompt, one.cached
        home = instances[one.instance]
        home.join(sequence)
        if one.generated:
            home.prefills.remove(sequence)
        assert home.grow(sequence, one.cached)
        if one.late:
            sequence.job.give_up()
    policy.relaid(instances, 0.0)
    policy.keep_for(switch.after)

    leaving = [instance for instance in instances if _leaves(switch, instance.spec)]
    there = {instance.spec.group for instance in instances}
    hosts = []
    for plan in switch.after.instances:
        if plan.group not in there:
            host = FakeInstance(dataclasses.replace(plan, tiers=()), allocators, DEVICES, 4096 // PAGE)
            hosts.append(Destination(host.spec, host.device_of, switch.rows, host.total_pages(), PAGE))
    pool: Any = types.SimpleNamespace(
        allocators=allocators, index=None, shape=types.SimpleNamespace(page_size=PAGE), copied=lambda *_: None
    )
    travellers = [Leaving(s, instance.device_of) for instance in leaving for s in instance.rows.values()]
    moves = plan_moves(travellers, hosts, pool, seats=policy.place)
    return {
        one.sequence.request.id: None if host is None else hosts[host].spec.group
        for one, host in zip(travellers, moves.assigned, strict=True)
    }


@settings(max_examples=150, deadline=None)
@given(switches())
def test_engine_and_model_seat_everybody_alike(switch: Switch) -> None:
    assert COST.page_size == PAGE
    assert seats_of_the_engine(switch) == seats_of_the_model(switch)


def test_who_is_late_is_parked_and_who_is_in_time_decodes_in_both() -> None:
    before = place([Shape(8)], DEVICES)
    after = place([Shape(4, PREFILL), Shape(4, DECODE)], DEVICES)
    requests = [Live(str(i), "chat", 0, 300, 309, 10, late=i % 2 == 0) for i in range(4)]
    switch = Switch(before, after, 4, requests)
    seats = seats_of_the_engine(switch)
    assert seats == seats_of_the_model(switch)
    roles = {name: group[1] for name, group in seats.items() if group is not None}
    assert roles == {"0": PREFILL, "1": DECODE, "2": PREFILL, "3": DECODE}


def test_tiers_keep_apart_in_both() -> None:
    before = place([Shape(8)], DEVICES)
    after = place([Shape(4, tiers=("chat",)), Shape(4, tiers=("code",))], DEVICES)
    requests = [Live(str(i), ("chat", "code")[i // 3], 0, 300, 309, 10, late=False) for i in range(6)]
    switch = Switch(before, after, 6, requests)
    seats = seats_of_the_engine(switch)
    assert seats == seats_of_the_model(switch)
    assert collections.Counter(seats.values()) == {((0, 1, 2, 3), "mixed"): 3, ((4, 5, 6, 7), "mixed"): 3}
    assert seats["0"] == seats["1"] == seats["2"]
