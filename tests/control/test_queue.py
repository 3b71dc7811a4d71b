"""The waiting queue against a plain model of its rules, and its promises as properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.queue import WaitingQueue
from nitsum_jax.control.tiers import DEFAULT_TIERS, Tier
from nitsum_jax.errors import OverloadedError

CHAT, STANDARD, BATCH = DEFAULT_TIERS  # TTFT 0.5 s, 2 s, 60 s
TIERS = st.sampled_from([CHAT, STANDARD, BATCH, Tier("twin", 500, 10)])


def pop_all(queue: WaitingQueue, now_s: float) -> list[str]:
    ids = []
    while (entry := queue.pop_next(now_s)) is not None:
        ids.append(entry.id)
    return ids


def test_least_slack_first() -> None:
    queue = WaitingQueue(10)
    queue.push("batch", BATCH, 0.0, 1)
    queue.push("standard", STANDARD, 0.0, 1)
    queue.push("chat", CHAT, 0.3, 1)
    assert pop_all(queue, 0.4) == ["chat", "standard", "batch"]


def test_ties_go_by_arrival_then_push() -> None:
    queue = WaitingQueue(10)
    queue.push("late arrival", CHAT, 2.0, 1)  # deadline 2.5
    queue.push("early arrival", STANDARD, 0.5, 1)  # deadline 2.5
    queue.push("b", CHAT, 3.0, 1)
    queue.push("a", CHAT, 3.0, 1)
    assert pop_all(queue, 2.0) == ["early arrival", "late arrival", "b", "a"]


def test_late_requests_wait_behind_those_that_can_still_make_it() -> None:
    queue = WaitingQueue(10)
    queue.push("missed second", CHAT, 0.2, 1)
    queue.push("missed first", STANDARD, 0.1, 1)
    queue.push("just in time", CHAT, 2.5, 1)
    queue.push("relaxed", BATCH, 0.0, 1)
    assert pop_all(queue, 3.0) == ["just in time", "relaxed", "missed first", "missed second"]


def test_at_its_deadline_a_request_is_not_yet_late() -> None:
    queue = WaitingQueue(10)
    queue.push("batch", BATCH, 0.0, 1)
    queue.push("chat", CHAT, 0.0, 1)
    first = queue.peek(0.5)
    assert first is not None
    assert first.id == "chat"
    later = queue.peek(0.5001)
    assert later is not None
    assert later.id == "batch"


def test_predicted_prefill_time_is_taken_off_the_slack() -> None:
    queue = WaitingQueue(10, prefill_s_per_token=0.001)
    queue.push("short", STANDARD, 0.0, 10)
    queue.push("long", STANDARD, 0.5, 1_000)
    queue.push("hopeless", CHAT, 0.5, 10_000)
    first = queue.peek(0.5)
    assert first is not None
    assert first.latest_start_s == pytest.approx(1.5)
    assert pop_all(queue, 0.5) == ["long", "short", "hopeless"]


def test_a_full_queue_refuses_and_recovers() -> None:
    queue = WaitingQueue(2)
    queue.push("a", CHAT, 0.0, 5)
    queue.push("b", CHAT, 0.0, 7)
    with pytest.raises(OverloadedError, match=r"queue is full \(2 requests are waiting\): try again later, or raise"):
        queue.push("c", CHAT, 0.0, 1)
    assert (len(queue), queue.prompt_tokens, "c" in queue, queue.capacity) == (2, 12, False, 2)
    assert queue.remove("a")
    queue.push("c", CHAT, 0.0, 1)
    assert pop_all(queue, 0.0) == ["b", "c"]
    assert (len(queue), queue.prompt_tokens) == (0, 0)


def test_remove_finds_late_requests_too_and_ignores_unknown_ids() -> None:
    queue = WaitingQueue(10)
    for name in ("a", "b", "c"):
        queue.push(name, CHAT, 0.0, 1)
    queue.peek(10.0)  # all are late now
    assert queue.remove("b")
    assert not queue.remove("b")
    assert not queue.remove("never")
    assert pop_all(queue, 10.0) == ["a", "c"]


def test_an_id_waits_once_at_a_time() -> None:
    queue = WaitingQueue(10)
    queue.push("a", CHAT, 0.0, 1)
    with pytest.raises(ValueError, match="'a' is in the queue already"):
        queue.push("a", BATCH, 0.0, 1)
    assert pop_all(queue, 0.0) == ["a"]
    queue.push("a", BATCH, 0.0, 1)
    assert len(queue) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"capacity": 0},
        {"capacity": 1, "aging_every": 0},
        {"capacity": 1, "patience_s": -1.0},
        {"capacity": 1, "patience_s": float("nan")},
        {"capacity": 1, "prefill_s_per_token": -0.1},
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        WaitingQueue(**arguments)  # type: ignore[arg-type]


def test_an_empty_queue_has_nothing() -> None:
    queue = WaitingQueue(1)
    assert queue.peek(0.0) is None
    assert queue.pop_next(0.0) is None
    assert len(queue) == 0


def test_aging_gives_every_nth_pop_to_those_who_waited_longest() -> None:
    queue = WaitingQueue(100, patience_s=10.0, aging_every=3)
    for i in range(2):
        queue.push(f"old{i}", CHAT, float(i), 1)
    for i in range(6):
        queue.push(f"new{i}", CHAT, 20.0, 1)
    assert pop_all(queue, 20.0) == ["new0", "new1", "old0", "new2", "new3", "old1", "new4", "new5"]


class Model:
    """The rules of the queue written down as they read, without any cleverness."""

    def __init__(self, patience_s: float, aging_every: int) -> None:
        self.patience_s, self.aging_every = patience_s, aging_every
        self.waiting: list[tuple[str, float, float]] = []  # (id, arrival, deadline) in order of pushes
        self.passed_over = 0

    def next(self, now_s: float) -> tuple[str | None, bool]:
        """(id, whether an aged request is passed over)."""
        fresh = [w for w in self.waiting if w[2] >= now_s]
        late = [w for w in self.waiting if w[2] < now_s]
        aged = [w for w in late if now_s - w[1] >= self.patience_s]
        if fresh and not (aged and self.passed_over == self.aging_every - 1):
            return min(fresh, key=lambda w: (w[2], w[1]))[0], bool(aged)
        return (min(late, key=lambda w: w[1])[0], False) if late else (None, False)

    def pop(self, now_s: float) -> str | None:
        found, passed_over = self.next(now_s)
        self.passed_over = self.passed_over + 1 if passed_over else 0
        self.waiting = [w for w in self.waiting if w[0] != found]
        return found


PUSH = st.tuples(st.just("push"), TIERS, st.integers(0, 40))
POP = st.tuples(st.just("pop"), st.none(), st.just(0))
REMOVE = st.tuples(st.just("remove"), st.none(), st.integers(0, 30))
WAIT = st.tuples(st.just("wait"), st.none(), st.integers(0, 80))


@given(st.lists(st.one_of(PUSH, PUSH, POP, REMOVE, WAIT), max_size=60), st.integers(0, 12), st.integers(1, 4))
def test_equals_the_model(
    actions: list[tuple[str, Tier | None, int]], patience_quarters: int, aging_every: int
) -> None:
    """Times are quarters of a second, exact in floating point; arrivals may lie in the past, in any order."""
    patience_s = patience_quarters / 4
    queue, model, now_s = (
        WaitingQueue(20, patience_s=patience_s, aging_every=aging_every),
        Model(patience_s, aging_every),
        10.0,
    )
    for number, (action, tier, amount) in enumerate(actions):
        if action == "push":
            assert tier is not None
            arrival = now_s - amount / 4
            if len(model.waiting) < 20:
                queue.push(str(number), tier, arrival, number)
                model.waiting.append((str(number), arrival, arrival + tier.ttft_ms / 1000))
            else:
                with pytest.raises(OverloadedError):
                    queue.push(str(number), tier, arrival, number)
        elif action == "remove":
            there = any(w[0] == str(amount) for w in model.waiting)
            model.waiting = [w for w in model.waiting if w[0] != str(amount)]
            assert queue.remove(str(amount)) == there
        elif action == "wait":
            now_s += amount / 4
        else:
            peeked = queue.peek(now_s)
            popped = queue.pop_next(now_s)
            assert popped == peeked
            assert (popped.id if popped else None) == model.pop(now_s)
        assert len(queue) == len(model.waiting)
        assert queue.prompt_tokens == sum(int(w[0]) for w in model.waiting)
    while model.waiting:
        popped = queue.pop_next(now_s)
        assert popped is not None
        assert popped.id == model.pop(now_s)
    assert len(queue) == 0


@given(
    st.lists(st.tuples(TIERS, st.floats(0, 100), st.integers(1, 4_000)), min_size=1, max_size=40), st.floats(100, 130)
)
def test_late_never_goes_before_in_time_while_nobody_has_aged(
    requests: list[tuple[Tier, float, int]], now_s: float
) -> None:
    queue = WaitingQueue(len(requests), patience_s=1e9)
    for i, (tier, arrival, tokens) in enumerate(requests):
        queue.push(str(i), tier, arrival, tokens)
    order = []
    while (entry := queue.pop_next(now_s)) is not None:
        order.append(entry)
    late = [entry.latest_start_s < now_s for entry in order]
    assert late == sorted(late)
    in_time = [entry.latest_start_s for entry in order if entry.latest_start_s >= now_s]
    assert in_time == sorted(in_time)
    after = [entry.arrival_s for entry in order if entry.latest_start_s < now_s]
    assert after == sorted(after)


@given(
    st.lists(TIERS, min_size=1, max_size=8),
    TIERS,
    st.integers(1, 5),
    st.floats(0, 40),
    st.floats(0.01, 0.4),
    st.lists(TIERS, min_size=1, max_size=5),
)
def test_nothing_starves_under_endless_overload(
    before: list[Tier], victim: Tier, aging_every: int, patience_s: float, step_s: float, rivals: list[Tier]
) -> None:
    """The queue is kept full by newcomers; the victim still leaves within the promised number of pops."""
    capacity = len(before) + 1
    queue = WaitingQueue(capacity, patience_s=patience_s, aging_every=aging_every)
    for i, tier in enumerate(before):
        queue.push(f"before{i}", tier, 0.0, 1)
    queue.push("victim", victim, 0.0, 1)
    owed_from_s = max(victim.ttft_ms / 1000, patience_s)
    owed_pops, now_s, number = 0, 0.0, 0
    while "victim" in queue:
        owed_pops += now_s > owed_from_s
        assert owed_pops <= capacity * aging_every
        assert queue.pop_next(now_s) is not None
        queue.push(f"new{number}", rivals[number % len(rivals)], now_s, 1)
        number += 1
        now_s += step_s
