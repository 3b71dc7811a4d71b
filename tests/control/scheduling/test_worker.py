"""A worker's accounts against a recount of everybody in it."""

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nitsum_jax.control.model.cell import ModelWorker
from nitsum_jax.control.model.job import ModelJob
from nitsum_jax.meshes.layout import InstanceSpec
from tests.control.cells import CHAT, CODE, job

PAGE = 16


def _worker(tokens: int = 100_000) -> ModelWorker:
    return ModelWorker(0, InstanceSpec((0,)), tokens, PAGE, 64)


def _pages(tokens: int) -> int:
    return (tokens + PAGE - 1) // PAGE


class _Naive:
    """Which requests are where, and how many tokens each has: nothing is summed up in between."""

    def __init__(self) -> None:
        self.prefilling: list[ModelJob] = []
        self.generated: dict[str, int] = {}
        self.jobs: dict[str, ModelJob] = {}

    def context(self) -> int:
        return sum(self.jobs[name].prompt_tokens + made - 1 for name, made in self.generated.items())

    def blocks(self) -> int:
        decoding = sum(_pages(self.jobs[name].prompt_tokens + made - 1) for name, made in self.generated.items())
        return decoding + sum(_pages(one.target) for one in self.prefilling)

    def steps_until_full(self, capacity: int) -> int:
        steps = 0
        held = {name: self.jobs[name].prompt_tokens + made - 1 for name, made in self.generated.items()}
        prefills = sum(_pages(one.target) for one in self.prefilling)
        while prefills + sum(_pages(tokens + steps + 1) for tokens in held.values()) <= capacity:
            steps += 1
        return steps


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_accounts_equal_a_recount(seed: int) -> None:
    draw = random.Random(seed)
    worker, naive = _worker(), _Naive()
    now = 0.0
    for number in range(40):
        kind = draw.choice(("seat", "begin", "advance", "advance", "leave", "late"))
        if kind == "seat":
            one = job(number, draw.choice((CHAT, CODE)), now, draw.randint(1, 300))
            worker.seat(one)
            naive.prefilling.append(one)
        elif kind == "begin" and naive.prefilling:
            one = naive.prefilling.pop(draw.randrange(len(naive.prefilling)))
            one.cached = one.target
            one.generated += 1
            one.first_token_s = now
            worker.begin_decode(one)
            naive.jobs[one.id], naive.generated[one.id] = one, one.generated
        elif kind == "advance":
            steps = draw.choice((1, 1, 2, 15, 16, 17, 40))
            worker.advance(steps)
            naive.generated = {name: made + steps for name, made in naive.generated.items()}
        elif kind == "late" and naive.generated:
            naive.jobs[draw.choice(sorted(naive.generated))].give_up()
        elif kind == "leave" and (naive.generated or naive.prefilling):
            if naive.generated and (not naive.prefilling or draw.random() < 0.7):
                name = draw.choice(sorted(naive.generated))
                one, made = naive.jobs[name], naive.generated.pop(name)
                worker.leave(one)
                assert (one.generated, one.cached) == (made, one.prompt_tokens + made - 1)
            else:
                worker.leave(naive.prefilling.pop())
        now += 0.01
        assert worker.used_blocks == naive.blocks()
        assert worker.context == naive.context()
        in_time = [naive.jobs[name].tier.tpot_ms / 1000 for name in naive.generated if not naive.jobs[name].late]
        assert worker.tightest_tpot_s() == min(in_time, default=math.inf)
        assert worker.jobs == len(naive.generated) + len(naive.prefilling)
        assert {one.id: worker.generated(one) for one in worker.decoding.values()} == naive.generated


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(0, 40), st.integers(0, 3))
def test_steps_until_full_equals_counting_up(prompts: list[int], spare: int, seated: int) -> None:
    naive = _Naive()
    need = sum(_pages(prompt) for prompt in prompts) + 2 * seated
    worker = _worker((need + spare) * PAGE)
    for number, prompt in enumerate(prompts):
        one = job(number, prompt=prompt)
        worker.seat(one)
        one.first_token_s, one.generated, one.cached = 0.0, 1, prompt
        worker.begin_decode(one)
        naive.jobs[one.id], naive.generated[one.id] = one, 1
    for number in range(seated):
        one = job(100 + number, prompt=PAGE + 1)
        worker.seat(one)
        naive.prefilling.append(one)
    assert worker.steps_until_full() == naive.steps_until_full(need + spare)
    worker.advance(worker.steps_until_full())
    assert 0 <= worker.free_blocks < len(prompts)
    assert worker.steps_until_full() == 0


def test_slack_is_that_of_the_most_urgent_token() -> None:
    worker = _worker()
    due = {}
    for number, (tier, first_s) in enumerate(((CHAT, 1.0), (CHAT, 0.9), (CODE, 0.2))):
        one = job(number, tier)
        worker.seat(one)
        one.first_token_s, one.generated = first_s, 1
        worker.begin_decode(one)
        due[one.id] = one
        worker.advance(3)
    least = min(one.next_token_due_s(worker.generated(one)) for one in due.values())
    assert abs(worker.slack_s(1.05) - (least - 1.05)) < 1e-9
    for one in due.values():  # a late request costs no other time
        one.give_up()
    assert worker.slack_s(1.05) == float("inf")
    assert list(worker.overdue(100.0)) == []


def test_overdue_are_those_whose_next_token_is_due() -> None:
    worker = _worker()
    for number, first_s in enumerate((0.0, 0.5, 1.0)):
        one = job(number)
        worker.seat(one)
        one.first_token_s, one.generated = first_s, 1
        worker.begin_decode(one)
    found = []
    for one in worker.overdue(0.6):
        one.give_up()
        found.append(one.id)
    assert found == ["0", "1"]  # due at 0.025, 0.525 and 1.025


def _decoding(worker: ModelWorker, number: int, first_token_s: float) -> ModelJob:
    one = job(number, CHAT, 0.0, 20)
    worker.seat(one)
    one.cached, one.generated, one.first_token_s = one.target, 1, first_token_s
    worker.begin_decode(one)
    return one


@given(st.permutations(range(8)), st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=8, max_size=8))
def test_first_tokens_may_come_at_another_time_and_at_the_same(order: list[int], times: list[float]) -> None:
    worker = _worker()
    jobs = [_decoding(worker, number, 1.0) for number in range(8)]
    for number in order:
        jobs[number].first_token_s = times[number]
        worker.retime(jobs[number])
        jobs.append(_decoding(worker, len(jobs), 1.0))
    tpot_s = CHAT.tpot_ms / 1000
    due = sorted((one.first_token_s or 0.0) - one.offset * tpot_s + worker.clock * tpot_s for one in jobs)
    assert worker.slack_s(0.0) == due[0]
    overdue = []
    for one in worker.overdue(math.inf):
        one.give_up()
        overdue.append((one.first_token_s or 0.0) - one.offset * tpot_s + worker.clock * tpot_s)
    assert overdue == due


def test_who_is_late_by_then_or_gone_is_not_timed_again() -> None:
    worker = _worker()
    late, gone = _decoding(worker, 0, 1.0), _decoding(worker, 1, 1.0)
    late.late, late.first_token_s = True, 9.0
    worker.retime(late)
    worker.leave(gone)
    worker.retime(gone)
    assert worker.slack_s(0.0) == math.inf
