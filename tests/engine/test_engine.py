"""The engine from request to tokens: right answers whoever else is served, and every way in which a request ends."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from nitsum_jax.engine.executables.compiling import Executables
from nitsum_jax.engine.request import FinishReason, Request, SamplingParams
from nitsum_jax.errors import InvalidInputError, NitsumError, OverloadedError, PreconditionError, UnavailableError
from nitsum_jax.models.loading import OpenModel
from tests.engine.harness import Harness, eventually, tiny_model
from tests.engine.quick import quick_compiles  # noqa: F401
from tests.engine.reference import generate, random_prompts
from tests.models.golden import tiny_models

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANT, VOCAB = "llama_odd", 93
SAMPLED: dict[str, Any] = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> OpenModel:
    return tiny_model(VARIANT, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared(model: OpenModel) -> Iterator[Harness]:
    """One engine for all tests that leave it as they found it."""
    with Harness(model, max_queue=64, layouts=("tp1x4", "tp2x2", "tp4")) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Iterator[Harness]:
    yield shared
    eventually(lambda: shared.engine.stats().running == 0)
    shared.assert_balanced()


def test_what_the_engine_is_asked_is_answered_on_its_thread(harness: Harness) -> None:
    assert harness.engine.ask(lambda: threading.current_thread().name).result(10) == "nitsum-engine"
    with pytest.raises(ZeroDivisionError):  # the asker's fault stays the asker's
        harness.engine.ask(lambda: 1 // 0).result(10)


# ---- answers


def test_greedy_answers_are_those_of_the_plain_loop(harness: Harness) -> None:
    prompts = random_prompts(12, (1, 70), VOCAB, seed=1)  # up to three prefill chunks
    expected, gap = generate(VARIANT, prompts, 24)
    assert gap > 1e-3  # no near-tie that another order of summation could turn
    for layout in ("tp1x4", "tp2x2", "tp4"):
        harness.switch(layout)
        answers = harness.run(prompts, 24)
        assert [list(answer.tokens) for answer in answers] == expected, layout
        assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    harness.switch("tp1x4")


def test_tokens_come_one_by_one_and_in_order_of_time(harness: Harness) -> None:
    (answer,) = harness.run([(5, 6, 7)], 20)
    assert len(answer.tokens) == 20
    assert list(answer.times) == sorted(answer.times)
    assert len(set(answer.times)) > 10


def test_a_seeded_answer_depends_on_nothing_but_request_and_seed(harness: Harness) -> None:
    prompts = random_prompts(6, (3, 40), VOCAB, seed=2)

    def say(which: list[int]) -> list[tuple[int, ...]]:
        names = [harness.submit(prompts[i], 16, seed=100 + i, **SAMPLED) for i in which]
        return [answer.tokens for answer in harness.collect(names)]

    together = say([0, 1, 2, 3, 4, 5])
    assert len(set(together)) == 6
    assert say([3]) == [together[3]]  # alone
    assert say([5, 3, 1]) == [together[5], together[3], together[1]]  # other mates, other rows
    for layout in ("tp4", "tp2x2", "tp1x4"):
        harness.switch(layout)
        assert say([0, 1, 2, 3, 4, 5]) == together, layout
    other = harness.run([prompts[0]], 16, seed=999, **SAMPLED)
    assert other[0].tokens != together[0]


def test_without_a_seed_each_answer_is_another(harness: Harness) -> None:
    answers = harness.run([(5, 6, 7)] * 4, 20, temperature=2.0)
    assert len({answer.tokens for answer in answers}) == 4


def test_greedy_and_sampled_requests_share_a_batch(harness: Harness) -> None:
    prompts = random_prompts(4, (3, 20), VOCAB, seed=3)
    alone = [answer.tokens for answer in harness.run(prompts, 12)]
    names = []
    for prompt in prompts:
        names.append(harness.submit(prompt, 12))
        harness.submit(prompt, 12, name=f"beside {prompt}", **SAMPLED)
    assert [answer.tokens for answer in harness.collect(names)] == alone
    harness.collect([f"beside {prompt}" for prompt in prompts])


# ---- ends


def test_a_stop_token_ends_a_request_and_is_not_sent(harness: Harness) -> None:
    (free,) = harness.run([(9, 8, 7)], 20)
    stop = free.tokens[6]
    first = free.tokens.index(stop)
    (answer,) = harness.run([(9, 8, 7)], 20, stop_token_ids=(stop, 0))
    assert answer.finish is FinishReason.STOP
    assert answer.tokens == free.tokens[:first]


def test_a_stop_token_may_be_the_first(harness: Harness) -> None:
    (free,) = harness.run([(9, 8, 7)], 1)
    (answer,) = harness.run([(9, 8, 7)], 20, stop_token_ids=free.tokens)
    assert (answer.tokens, answer.finish) == ((), FinishReason.STOP)


@pytest.mark.parametrize("max_tokens", [1, 2, 3])
def test_max_tokens(harness: Harness, max_tokens: int) -> None:
    (answer,) = harness.run([(4, 5)], max_tokens)
    assert (len(answer.tokens), answer.finish) == (max_tokens, FinishReason.LENGTH)


@pytest.mark.parametrize("prompt_len", [200, 255])
def test_the_context_may_be_filled_to_the_last_token(harness: Harness, prompt_len: int) -> None:
    (answer,) = harness.run(random_prompts(1, (prompt_len, prompt_len), VOCAB, seed=4), 1000)
    assert (len(answer.tokens), answer.finish) == (256 - prompt_len, FinishReason.LENGTH)


def test_half_of_32_streams_are_cancelled_in_mid_flight(harness: Harness) -> None:
    engine = harness.engine
    prompts = random_prompts(32, (5, 40), VOCAB, seed=5)
    expected = [answer.tokens for answer in harness.run(prompts, 60)]
    stats = []

    def cancel_half() -> None:
        stats.append(engine.stats())
        for name in names[::2]:
            engine.cancel(name)
        harness.recorder.when(names[0], 1000, lambda: stats.append(engine.stats()))  # at its end

    with harness.paused():
        names = [harness.submit(prompt, 60) for prompt in prompts]
        harness.recorder.when(names[-1], 3, cancel_half)
    cancelled = harness.collect(names[::2])
    before, after = stats
    assert (before.running, after.running) == (32, 16)
    assert after.blocks_free > before.blocks_free
    assert after.steps <= before.steps + 8  # within a step, of two in flight on each of four instances
    rest = harness.collect(names[1::2])
    assert [answer.tokens for answer in rest] == expected[1::2]
    assert {answer.finish for answer in rest} == {FinishReason.LENGTH}
    for answer, whole in zip(cancelled, expected[::2], strict=True):
        assert answer.tokens == whole[: len(answer.tokens)]  # no token is wrong because of it
    assert {answer.finish for answer in cancelled} == {FinishReason.CANCELLED}


def test_a_request_can_be_cancelled_while_it_waits(harness: Harness) -> None:
    with harness.paused():
        running = [harness.submit((1, 2, 3), 200) for _ in range(32)]
        waiting = harness.submit((1, 2, 3), 200)
        harness.recorder.when(running[0], 3, lambda: harness.engine.cancel(waiting))
    (answer,) = harness.collect([waiting])
    assert (answer.tokens, answer.finish) == ((), FinishReason.CANCELLED)
    for name in running:
        harness.engine.cancel(name)
    harness.collect(running)


def test_cancelling_what_is_unknown_or_over_does_nothing(harness: Harness) -> None:
    (answer,) = harness.run([(1, 2)], 2)
    harness.engine.cancel("request 1")
    harness.engine.cancel("nobody")
    assert answer.finish is FinishReason.LENGTH
    assert len(harness.run([(1, 2)], 2)[0].tokens) == 2


def test_a_deadline_ends_a_request_that_runs(harness: Harness) -> None:
    start = time.monotonic()
    name = harness.submit((1, 2, 3), 250, deadline_s=start + 0.03, temperature=1.0)
    (answer,) = harness.collect([name])
    if answer.finish is FinishReason.LENGTH:  # a fast machine
        assert answer.times[-1] < start + 0.1
    else:
        assert answer.finish is FinishReason.DEADLINE
        assert len(answer.tokens) < 250


def test_a_deadline_that_has_passed_ends_a_request_at_once(harness: Harness) -> None:
    name = harness.submit((1, 2, 3), 250, deadline_s=time.monotonic() - 1)
    (answer,) = harness.collect([name])
    assert answer.finish is FinishReason.DEADLINE
    assert len(answer.tokens) < 250


def test_a_deadline_is_over_with_its_request(harness: Harness) -> None:
    # The same id lives again when the deadline of its first life comes.
    name = harness.submit((1, 2, 3), 2, name="again", deadline_s=time.monotonic() + 0.15)
    harness.collect([name])
    harness.recorder._deltas.pop(name)
    harness.submit((1, 2, 3), 240, name="again", temperature=1.0)
    time.sleep(0.2)
    (answer,) = harness.collect([name])
    assert answer.finish is FinishReason.LENGTH


@pytest.mark.parametrize("ahead_s", [1e6, 1e12, float("inf")])
def test_a_deadline_may_be_as_far_away_as_one_likes(harness: Harness, ahead_s: float) -> None:
    name = harness.submit((1, 2, 3), 3, deadline_s=time.monotonic() + ahead_s)
    (answer,) = harness.collect([name])
    assert answer.finish is FinishReason.LENGTH


# ---- bad input


def request(**fields: Any) -> Request:
    return dataclasses.replace(Request("bad", (1, 2, 3), 4), **fields)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (request(prompt_ids=()), InvalidInputError, "the prompt is empty"),
        (request(max_tokens=0), InvalidInputError, "max_tokens=0"),
        (request(max_tokens=-5), InvalidInputError, "max_tokens=-5"),
        (request(prompt_ids=(1, 93)), InvalidInputError, "token id 93: ids go from 0 to 92"),
        (request(prompt_ids=(-1,)), InvalidInputError, "token id -1"),
        (request(stop_token_ids=(500,)), InvalidInputError, "stop_token_ids has the token id 500"),
        (request(prompt_ids=(1,) * 256), InvalidInputError, "maximum context length is 256 tokens"),
        (request(tier="golden"), InvalidInputError, "give one of interactive, standard, batch"),
        (request(sampling=SamplingParams(temperature=-1)), InvalidInputError, "temperature=-1"),
        (request(sampling=SamplingParams(temperature=float("nan"))), InvalidInputError, "temperature=nan"),
        (request(sampling=SamplingParams(top_p=0)), InvalidInputError, "top_p=0"),
        (request(sampling=SamplingParams(top_k=-1)), InvalidInputError, "top_k=-1"),
        (request(sampling=SamplingParams(min_p=2)), InvalidInputError, "min_p=2"),
        (request(sampling=SamplingParams(repetition_penalty=0)), InvalidInputError, "repetition_penalty=0"),
        (request(sampling=SamplingParams(seed=-1)), InvalidInputError, "seed=-1"),
        (request(sampling=SamplingParams(seed=2**32)), InvalidInputError, "seed=4294967296"),
    ],
)
def test_bad_requests_are_refused_and_others_go_on(
    harness: Harness, bad: Request, error: type[NitsumError], message: str
) -> None:
    name = harness.submit((1, 2, 3), 8)
    with pytest.raises(error) as caught:
        harness.engine.submit(bad)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    (answer,) = harness.collect([name])
    assert len(answer.tokens) == 8


def test_an_id_that_is_alive_cannot_be_used_again(harness: Harness) -> None:
    name = harness.submit((1, 2, 3), 100)
    with pytest.raises(PreconditionError, match="is alive: choose another id"):
        harness.submit((1, 2), 3, name=name)
    (answer,) = harness.collect([name])
    assert len(answer.tokens) == 100


@pytest.mark.parametrize(
    ("layout", "error", "message"),
    [
        ("", InvalidInputError, ""),
        ("tp3", InvalidInputError, "power of two"),
        ("nonsense", InvalidInputError, "nonsense"),
        ("tp8", PreconditionError, ""),
        ("tp2x4", PreconditionError, ""),
        ("tp2+tp1x2", PreconditionError, "not on the server's list: choose one of tp1x4; tp2x2; tp4"),
        ("tp2:prefill+tp2:decode", PreconditionError, "not on the server's list"),
        ("tp2:prefill+tp2:prefill", InvalidInputError, "no instance to decode"),
    ],
)
def test_bad_layouts_are_refused_at_once(harness: Harness, layout: str, error: type[NitsumError], message: str) -> None:
    before = harness.engine.layout()
    with pytest.raises(error) as caught:
        harness.ask_for(layout)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert harness.engine.layout() == before


def test_a_full_queue_refuses_more_and_keeps_what_it_has(harness: Harness) -> None:
    names: list[str] = []

    def flood() -> None:
        while len(names) < 500:
            names.append(harness.submit((1, 2, 3), 40))

    with harness.paused():
        with pytest.raises(OverloadedError, match="64 requests wait already"):
            flood()
        stats = harness.engine.stats()
        assert len(names) == stats.waiting == stats.queue_capacity == 64
    answers = harness.collect(names)
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    assert len({answer.tokens for answer in answers}) == 1


def test_a_sink_that_fails_stops_nobody(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    with harness.paused():
        name = harness.submit((1, 2, 3), 60)
        harness.recorder.when(name, 5, lambda: setattr(harness.recorder, "fail_next", True))
    (answer,) = harness.collect([name])
    assert answer.finish is FinishReason.LENGTH
    assert 55 <= len(answer.tokens) < 60  # what it did not take, the tokens of one turn, is gone
    assert "the sink failed" in caplog.text


# ---- the end of the engine


def test_nothing_compiles_in_the_way_of_requests(harness: Harness) -> None:
    engine = harness.engine
    engine.wait_for_layouts()
    assert set(engine.ready_layouts()) == {"tp1x4", "tp2x2", "tp4"}
    prompts = random_prompts(10, (1, 60), VOCAB, seed=6)
    harness.run(prompts, 5)
    compiles, before = harness.compiles(), engine.stats()
    for layout in ("tp2x2", "tp4", "tp1x4"):
        names = [harness.submit(prompt, 30, seed=1, **SAMPLED) for prompt in prompts]
        harness.wait_for_tokens(names[0], 2)
        harness.switch(layout)
        harness.collect(names)
    after = engine.stats()
    assert after.compiles == compiles
    assert after.switches == before.switches + 3
    assert after.tokens_generated == before.tokens_generated + 3 * 10 * 30
    assert after.steps > before.steps


def test_a_layout_can_be_prepared_before_it_is_asked_for(model: OpenModel) -> None:
    with Harness(model, layouts=("tp1x4", "tp2x2")) as harness:
        report = harness.engine.prepare_layout("tp2x2").result(60)
        assert (report.to_layout, report.sequences) == ("tp2x2", 0)
        assert str(harness.engine.layout()) == "tp1x4"
        with pytest.raises(PreconditionError, match="not on the server's list"):
            harness.engine.prepare_layout("tp4")


def test_it_is_told_for_which_layouts_somebody_waits(model: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, make = threading.Event(), Executables._make

    def held(executables: Executables, job: Any) -> jax.stages.Compiled:
        if len(job.group) == 2:
            gate.wait(60)
        return make(executables, job)

    monkeypatch.setattr(Executables, "_make", held)
    with Harness(model, layouts=("tp1x4", "tp2x2")) as harness:
        engine = harness.engine
        assert engine.compiling().layouts == ()
        prepared, switched = engine.prepare_layout("tp2x2"), engine.set_layout("tp2x2")
        (layout,) = engine.compiling().layouts  # two wait for the same
        assert (layout.layout, layout.stage, layout.ready) == ("tp2x2", "compiling", 0)
        assert layout.needed == 4  # the largest bucket of both phases, for two groups
        gate.set()
        assert prepared.result(60).to_layout == switched.result(60).to_layout == "tp2x2"
        assert engine.compiling().layouts == ()


def test_draining_finishes_what_is_alive_and_takes_no_more(model: OpenModel) -> None:
    with Harness(model, layouts=("tp4",)) as harness:
        names = [harness.submit((1, 2, 3), 50) for _ in range(12)]
        assert harness.engine.drain(60)
        assert all(len(answer.tokens) == 50 for answer in harness.collect(names))
        with pytest.raises(UnavailableError, match="takes no new requests"):
            harness.submit((1, 2, 3), 5)
        harness.assert_balanced()


def test_draining_gives_up_in_time(model: OpenModel) -> None:
    with Harness(model, layouts=("tp4",)) as harness:
        with harness.paused():
            name = harness.submit((1, 2, 3), 250)
            assert not harness.engine.drain(0.01)
        harness.engine.close()
        harness.collect([name])


def test_closing_ends_every_stream_and_every_thread(model: OpenModel) -> None:
    harness = Harness(model)
    names = [harness.submit((1, 2, 3), 250) for _ in range(40)]
    harness.wait_for_tokens(names[0], 2)
    harness.engine.close()
    answers = harness.collect(names)
    ends = {answer.finish for answer in answers}  # a fast engine may have finished the first
    assert FinishReason.CANCELLED in ends
    assert ends <= {FinishReason.CANCELLED, FinishReason.LENGTH}
    assert not harness.engine._running._thread.is_alive()
    harness.engine.close()  # once more does nothing
    with pytest.raises(UnavailableError):
        harness.submit((1, 2, 3), 5)
    with pytest.raises(UnavailableError):
        harness.ask_for("tp4")
    harness.engine.cancel(names[0])
    harness.assert_balanced()


def test_switches_that_closing_overtakes_are_told_so(model: OpenModel) -> None:
    harness = Harness(model, layouts=("tp1x4", "tp4"))
    futures = [harness.ask_for(layout) for layout in ("tp4", "tp1x4") * 3]
    harness.engine.close()
    for future in futures:
        error = future.exception(30)
        assert error is None or isinstance(error, UnavailableError)


# ---- start


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"devices": 99}, PreconditionError, ""),
        ({"layout": "tp2+tp1x2"}, PreconditionError, "not on the server's list"),
        ({"layouts": ()}, InvalidInputError, "list of layouts is empty"),
        ({"layouts": ("tp8",)}, PreconditionError, ""),
        ({"vshards": 3}, InvalidInputError, "vshards=3 is not a power of two"),
        ({"vshards": 2, "layouts": ("tp4",)}, PreconditionError, ""),
        ({"max_model_len": 100_000}, InvalidInputError, "context of 512 tokens: lower --max_model_len"),
        ({"kv_cache_gib": 100_000.0}, PreconditionError, "lower --kv_cache_gib"),
        ({"kv_cache_gib": 1e-7}, PreconditionError, "raise --kv_cache_gib"),
    ],
)
def test_what_cannot_start_says_what_to_change(
    model: OpenModel, settings: dict[str, Any], error: type[NitsumError], message: str
) -> None:
    with pytest.raises(error) as caught:
        Harness(model, **({"layouts": ("tp1x4",)} | settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_memory_report_names_weights_cache_and_workspace(harness: Harness) -> None:
    for word in ("weights", "KV cache", "workspace", "cut:"):
        assert word in harness.engine.memory_report


def test_a_process_that_forgets_to_close_its_engine_ends_quietly(tmp_path: Path) -> None:
    # With compilations under way: threads inside XLA would take the interpreter down as it ends.
    code = """
import sys
import threading
from nitsum_jax.engine.config import EngineConfig
from nitsum_jax.engine.engine import start_engine
from nitsum_jax.models.loading import open_model
engine = start_engine(open_model(sys.argv[1]), EngineConfig(devices=4, max_model_len=128, dtype="float32"), print)
"""
    command = [sys.executable, "-c", code, str(tiny_models.write_hf_folder("llama_gqa_tied", tmp_path / "model"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
