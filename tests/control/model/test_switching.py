"""Switches of the model: the engine's map of vshards, nothing lost, and what they cost."""

import dataclasses
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.switching import Switched
from nitsum_jax.control.plan import Shape, homogeneous, partitions, place
from nitsum_jax.control.scheduling.placement import moves
from nitsum_jax.meshes.layout import InstanceSpec, Layout, Role
from nitsum_jax.meshes.vshards import VshardMap
from tests.control.cells import COST, job, make_cell, serve, some_jobs


def test_moves_count_the_vshards_that_change_their_device() -> None:
    for before, after in itertools.product([(0, 1), (0, 1, 2, 3), (2,), (4, 5)], repeat=2):
        engine = VshardMap(4)
        changed = [
            (engine.device_of(before, v), engine.device_of(after, v))
            for v in range(4)
            if engine.device_of(before, v) != engine.device_of(after, v)
        ]
        found = moves(before, after, 4)
        assert sum(found.values()) == pytest.approx(len(changed) / 4)
        assert set(found) == set(changed)
    assert moves((0, 1), (0, 1), 8) == {}


def _random_plan(draw: random.Random) -> Layout:
    cut = draw.choice(list(partitions(8, (1, 2, 4, 8))))
    tiers = [(), ("chat",), ("code",)]
    shapes = [Shape(tp, "mixed", draw.choice(tiers)) for tp in cut]
    if len(cut) > 1 and draw.random() < 0.4:
        prefills = draw.randint(1, len(cut) - 1)
        shapes = [Shape(tp, "prefill" if i < prefills else "decode") for i, tp in enumerate(cut)]
    return place(shapes, 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_is_lost_in_random_switches(seed: int) -> None:
    draw = random.Random(seed)
    cell, steps = make_cell(_random_plan(draw))
    reports: list[Switched] = []
    cell.on_switch = reports.append
    jobs = some_jobs(60, 15.0, seed)
    serve(cell, jobs, [(draw.uniform(0, 5), _random_plan(draw)) for _ in range(4)])
    assert len(steps.done) == len(jobs)
    assert not cell.alive
    assert not cell.switching
    assert all((w.jobs, w.used_blocks, w.context, w.incoming, w.sending) == (0, 0, 0, 0, 0) for w in cell.workers)
    recomputed = sum(one.recomputed for one in jobs)
    decoded = sum(sequences for *_, sequences, _, _ in steps.steps)
    prefilled = sum(new for *_, spans in steps.steps for new, _ in spans)
    if cell.preemptions == 0:
        assert decoded == sum(one.output_tokens - 1 for one in jobs)
        assert prefilled == sum(one.prompt_tokens for one in jobs)
    else:
        assert prefilled >= sum(one.prompt_tokens for one in jobs)
        assert recomputed >= 0
    # No device does two things at once, whatever the plan was.
    by_device: dict[int, list[tuple[float, float]]] = {}
    for _, devices, start_s, end_s, *_ in steps.steps:
        for device in devices:
            by_device.setdefault(device, []).append((start_s, end_s))
    for spans in by_device.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert all(a.after == b.before for a, b in itertools.pairwise(reports))


def test_instances_that_stay_keep_running() -> None:
    before = Layout((InstanceSpec((0, 1, 2, 3)), InstanceSpec((4, 5)), InstanceSpec((6, 7))))
    after = Layout((InstanceSpec((0, 1, 2, 3)), InstanceSpec((4, 5, 6, 7))))
    cell, steps = make_cell(before)
    reports: list[Switched] = []
    cell.on_switch = reports.append
    serve(cell, some_jobs(40, 20.0, seed=2), [(1.0, after)])
    (report,) = reports
    assert report.devices == (4, 5, 6, 7)
    assert report.requeued == 0
    assert report.stall_s >= COST.profile.switch_host_s
    at_switch = [s for s in steps.steps if s[1] == (0, 1, 2, 3) and s[2] < report.time_s < s[3]]
    assert len({s[0] for s in steps.steps if s[1] == (0, 1, 2, 3)}) == 1  # the same instance before and after
    assert len(at_switch) <= 1


def test_a_change_of_tiers_alone_stops_nobody() -> None:
    before = place([Shape(4), Shape(4)], 8)
    after = place([Shape(4, tiers=("chat",)), Shape(4, tiers=("code",))], 8, before)
    cell, _ = make_cell(before)
    reports: list[Switched] = []
    cell.on_switch = reports.append
    serve(cell, some_jobs(20, 20.0, seed=4), [(0.5, after)])
    (report,) = reports
    assert (report.devices, report.stall_s, report.sequences) == ((), 0.0, 0)
    assert [worker.plan.tiers for worker in cell.workers] == [("chat",), ("code",)]


def test_one_switch_at_a_time_and_not_before_it_is_compiled() -> None:
    cell, _ = make_cell(homogeneous(8, 8))
    reports: list[Switched] = []
    cell.on_switch = reports.append
    assert cell.switch(homogeneous(8, 4), prepare_s=3.0)
    assert not cell.switch(homogeneous(8, 2))
    serve(cell, some_jobs(60, 10.0, seed=1))
    (report,) = reports
    assert report.asked_s == 0.0
    assert report.time_s >= 3.0
    assert cell.plan == homogeneous(8, 4)


def test_who_decodes_and_finds_only_an_instance_that_prefills_is_parked_there_and_handed_over() -> None:
    before = homogeneous(8, 4)
    after = Layout((InstanceSpec((0, 1, 2, 3)), InstanceSpec((4, 5, 6, 7), Role.PREFILL)))
    cell, steps = make_cell(before)
    reports: list[Switched] = []
    cell.on_switch = reports.append
    jobs = [job(i, arrival_s=0.001 * i, prompt=4000, output=600) for i in range(8)]
    serve(cell, jobs, [(0.9, after)])
    (report,) = reports
    assert report.sequences > 0
    assert (report.kv_bytes, report.requeued) == (0, 0)  # the devices are the same
    assert len(steps.done) == 8
    assert sum(sequences for *_, sequences, _, _ in steps.steps) == 8 * 599


def test_a_switch_lets_nobody_into_an_instance_that_decodes_whom_the_scheduler_kept_out() -> None:
    before = Layout(
        (
            InstanceSpec((0, 1), Role.DECODE),
            InstanceSpec((2, 3, 4, 5), Role.PREFILL),
            InstanceSpec((6, 7), Role.PREFILL),
        )
    )
    after = Layout(
        (
            InstanceSpec((0, 1), Role.DECODE),
            InstanceSpec((2, 3), Role.PREFILL),
            InstanceSpec((4, 5, 6, 7), Role.PREFILL),
        )
    )
    cell, steps = make_cell(before)
    jobs = [job(i, arrival_s=i / 150, prompt=400, output=400) for i in range(600)]
    for one in jobs:
        cell.run_until(one.arrival_s)
        cell.add(one)
    (decoder,) = (worker for worker in cell.workers if worker.takes_decodes)
    kept_out = [one for worker in cell.workers for one in worker.outgoing.values()]
    count = len(decoder.decoding)
    assert len(kept_out) > 100
    assert count > 20
    cell.switch(after)
    cell.run_until(cell.now_s + 0.3)
    assert cell.plan == after
    assert len(decoder.decoding) < count + 0.1 * len(kept_out)
    assert sum(len(worker.outgoing) for worker in cell.workers) > 0.8 * len(kept_out)
    assert cell.preemptions == 0
    cell.run_until(math.inf)
    assert len(steps.done) == len(jobs)
    assert all((w.jobs, w.used_blocks) == (0, 0) for w in cell.workers)


def test_resharding_by_the_general_path_costs_more() -> None:
    def stall(device_put: bool) -> float:
        cell, _ = make_cell(homogeneous(8, 8))
        cell.device_put = device_put
        reports: list[Switched] = []
        cell.on_switch = reports.append
        serve(cell, some_jobs(30, 20.0, seed=5), [(1.0, homogeneous(8, 2))])
        return reports[0].stall_s

    profile = COST.profile
    assert stall(True) > stall(False) + profile.weight_bytes / 8 / profile.device_put_bytes_per_s / 2
    assert dataclasses.is_dataclass(Switched)
