"""The rule by which a switch seats those whose instances go."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.control.plan import DECODE, MIXED, PREFILL, Shape
from nitsum_jax.control.scheduling.placement import Seat, Traveller, WorkerRoom
from nitsum_jax.control.scheduling.scheduler import Scheduler
from nitsum_jax.control.scheduling.worker import Worker
from tests.control.cells import CHAT, CODE, COST, TIERS

PAGE = 16
OLD = (0, 1, 2, 3)  # all come from there


def worker(index: int, role: str = MIXED, *, pages: int = 1000, rows: int = 8, tiers: tuple[str, ...] = ()) -> Worker:
    return Worker(index, Shape(2, role, tiers).on((2 * index, 2 * index + 1)), pages * PAGE, PAGE, rows)


def decoding(
    name: str, tokens: int = 320, *, late: bool = False, waited: bool = False, since_s: float = 0.0
) -> Traveller:
    job = ModelJob(name, CHAT, since_s, tokens - 9, generated=10, cached=tokens, late=late)
    return Traveller(job, OLD, tokens, decodes=True, waited=waited)


def half_done(name: str, cached: int, target: int = 320) -> Traveller:
    return Traveller(ModelJob(name, CHAT, 0.0, target, cached=cached), OLD, cached, decodes=False)


def seats(travellers: list[Traveller], workers: list[Worker]) -> list[Seat | None]:
    return Scheduler(COST, TIERS).place(travellers, workers, lambda: WorkerRoom(travellers, workers))


def test_prompts_go_where_prompts_are_computed_and_who_decodes_where_others_do() -> None:
    workers = [worker(0, DECODE), worker(1, PREFILL)]
    assert seats([decoding("a"), half_done("b", 100)], workers) == [Seat(0, False), Seat(1, False)]


def test_who_waited_and_who_is_late_is_parked_while_there_is_room_for_that() -> None:
    travellers = [decoding("a", late=True), decoding("b", waited=True), decoding("c")]
    assert seats(travellers, [worker(0, DECODE), worker(1, PREFILL)]) == [Seat(1, True), Seat(1, True), Seat(0, False)]
    assert seats(travellers, [worker(0), worker(1, DECODE)]).count(None) == 0  # without: they decode


def test_nobody_loses_what_is_computed_for_want_of_a_role() -> None:
    assert seats([decoding("a")], [worker(0, PREFILL)]) == [Seat(0, True)]
    assert seats([decoding("a"), decoding("b")], [worker(0, DECODE, rows=1), worker(1, PREFILL)]) == [
        Seat(0, False),
        Seat(1, True),
    ]
    assert seats([half_done("a", 100)], [worker(0, DECODE)]) == [Seat(0, False)]
    assert seats([half_done("a", 0)], [worker(0, DECODE)]) == [None]  # nothing is lost


def test_without_room_for_all_those_go_whom_it_harms_least() -> None:
    travellers = [
        decoding("late and long", 900, late=True),
        decoding("last", 800, since_s=2.0),
        decoding("first", 100, since_s=0.0),
        decoding("second", 200, since_s=1.0),
    ]
    assert seats(travellers, [worker(0, rows=2)]) == [None, None, Seat(0, False), Seat(0, False)]


def test_its_tier_and_then_the_emptier_instance_decide() -> None:
    workers = [worker(0, tiers=("code",)), worker(1, tiers=("chat",))]
    assert seats([decoding("a")], workers) == [Seat(1, False)]
    code = Traveller(ModelJob("b", CODE, 0.0, 311, generated=10, cached=320), OLD, 320, decodes=True)
    assert seats([code], workers) == [Seat(0, False)]
    spread = seats([decoding(str(i)) for i in range(6)], [worker(0, pages=300), worker(1, pages=300)])
    assert collections.Counter(seat.instance for seat in spread if seat) == {0: 3, 1: 3}


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[Traveller], list[Worker]]:
    roles = draw(st.sampled_from([(MIXED,), (MIXED, MIXED), (PREFILL, DECODE), (PREFILL, PREFILL), (DECODE,)]))
    pages, rows = draw(st.integers(10, 100)), draw(st.integers(1, 5))
    workers = [worker(i, role, pages=pages, rows=rows) for i, role in enumerate(roles)]
    flags = st.booleans()
    kinds = st.one_of(
        st.builds(
            lambda n, late, waited: decoding("x", n, late=late, waited=waited), st.integers(10, 900), flags, flags
        ),
        st.builds(lambda n, more: half_done("x", n, n + more), st.integers(0, 500), st.integers(1, 400)),
    )
    travellers = draw(st.lists(kinds, max_size=12))
    for number, one in enumerate(travellers):
        one.job.id = str(number)
    return travellers, workers


@given(crowds())
def test_nobody_goes_where_there_is_no_room_and_nobody_is_left_out_where_there_is(
    crowd: tuple[list[Traveller], list[Worker]],
) -> None:
    travellers, workers = crowd
    found = seats(travellers, workers)
    room = WorkerRoom(travellers, workers)
    used, count = [0] * len(workers), [0] * len(workers)
    for number, seat in enumerate(found):
        if seat is not None:
            one, there = travellers[number], workers[seat.instance]
            room.take(number, seat.instance)
            used[seat.instance] += there.pages(one.cached if one.decodes else one.job.target)
            count[seat.instance] += 1
            assert seat.parked == (one.decodes and there.plan.role == PREFILL)
    for there, pages, rows in zip(workers, used, count, strict=True):
        assert pages <= there.capacity_blocks
        assert rows <= there.max_batch
    for number, seat in enumerate(found):
        if seat is None and travellers[number].cached:
            assert not any(room.fits(number, instance) for instance in range(len(workers)))
