import asyncio
from collections.abc import Sequence

import grpc
import pytest

from nitsum_jax.engine.request import FinishReason, Request, TokenDelta
from nitsum_jax.runtime.streams.output import OutputTimes
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.fake_engine import fake_logprob
from tests.server.harness import EOS, TOKENIZER, ask, echo, refusal, running, says, until

STOP, LENGTH = nitsum_pb2.FINISH_REASON_STOP, nitsum_pb2.FINISH_REASON_LENGTH


def test_streams_text_and_tokens_and_says_how_it_ended() -> None:
    async def scenario() -> None:
        async with running() as run:
            answer = await ask(run.stub, "héllo 🙂", return_prompt_ids=True)
            ids = TOKENIZER.encode("héllo 🙂")
            assert (answer.text, answer.ids) == ("héllo 🙂", ids)
            assert (list(answer.started.prompt_ids), answer.started.prompt_tokens) == (ids, len(ids))
            assert answer.started.tier == "standard"
            assert answer.finished.finish_reason == STOP
            assert not answer.finished.HasField("stop")
            assert answer.finished.usage == nitsum_pb2.Usage(prompt_tokens=len(ids), output_tokens=len(ids))
            assert answer.finished.ttft_ms > 0
            assert answer.finished.tpot_ms > 0
            assert len(answer.deltas) > 3  # it streamed
            assert not (await ask(run.stub, "x")).started.prompt_ids

    asyncio.run(scenario())


def test_usage_tells_what_the_prefix_cache_had() -> None:
    async def scenario() -> None:
        async with running(cached=lambda request: len(request.prompt_ids) // 4 * 4) as run:
            for fields in ({}, {"stop": ["c"]}, {"stop_token_ids": TOKENIZER.encode("a")}):  # the last: not one token
                answer = await ask(run.stub, "abcdefgh!", **fields)
                assert (answer.finished.usage.prompt_tokens, answer.finished.usage.cached_tokens) == (9, 8)

    asyncio.run(scenario())


def test_every_piece_of_streamed_text_is_whole_characters() -> None:
    async def scenario() -> None:
        async with running(says("añ🙂b", end=False)) as run:
            answer = await ask(run.stub, max_tokens=7)  # a, 2 bytes, 4 bytes
            assert answer.text == "añ🙂"
            assert "�" not in answer.text
            cut = await ask(run.stub, max_tokens=5)  # in the middle of the emoji
            assert cut.text == "añ�"
            assert cut.finished.finish_reason == LENGTH
            assert cut.finished.usage.output_tokens == 5

    asyncio.run(scenario())


def test_chat_and_token_prompts_and_what_reaches_the_engine() -> None:
    async def scenario() -> None:
        async with running() as run:
            chat = nitsum_pb2.ChatPrompt(messages=[nitsum_pb2.ChatMessage(role="user", content="hi")])
            assert (await ask(run.stub, chat=chat)).text == "<user>hi<assistant>"
            sampling = nitsum_pb2.SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, seed=3)
            await ask(
                run.stub,
                tokens=nitsum_pb2.TokenPrompt(ids=[5, 6]),
                sampling=sampling,
                stop_token_ids=[9],
                tier="batch",
                max_tokens=11,
            )
            request = run.engine.requests[-1]
            assert (request.prompt_ids, request.max_tokens, request.tier) == ((5, 6), 11, "batch")
            assert request.stop_token_ids == (EOS, 9)
            assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 7, 3)
            assert request.deadline_s is not None  # that of the call

    asyncio.run(scenario())


def test_the_server_tells_the_seed_that_it_drew() -> None:
    async def scenario() -> None:
        async with running() as run:
            first, second = await ask(run.stub), await ask(run.stub)
            assert first.started.seed == run.engine.requests[0].sampling.seed
            assert first.started.seed != second.started.seed

    asyncio.run(scenario())


def test_ignore_eos_goes_on_to_max_tokens() -> None:
    async def scenario() -> None:
        async with running(says("ab")) as run:
            answer = await ask(run.stub, ignore_eos=True, max_tokens=7)
            assert answer.finished.finish_reason == LENGTH
            assert answer.ids.count(EOS) == 2
            assert answer.text == "ababa"  # special tokens are no text

    asyncio.run(scenario())


def test_an_answer_without_tokens_has_no_times() -> None:
    async def scenario() -> None:
        async with running(lambda request: [EOS]) as run:
            answer = await ask(run.stub)
            assert answer.deltas == []
            assert not answer.finished.HasField("ttft_ms")
            assert not answer.finished.HasField("tpot_ms")

    asyncio.run(scenario())


@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_stop_string_over_token_borders_cuts_the_text_and_cancels(tokens_per_step: int) -> None:
    async def scenario() -> None:
        async with running(says("one, two, three, ", end=False), tokens_per_step=tokens_per_step) as run:
            answer = await ask(run.stub, stop=["nope", ", th"], max_tokens=1000)
            assert answer.text == "one, two"
            assert answer.finished.finish_reason == STOP
            assert answer.finished.stop == ", th"
            # The tokens that spelled the stop string were streamed, those after it were not.
            assert answer.ids == TOKENIZER.encode("one, two, th")
            assert answer.finished.usage.output_tokens == len(answer.ids)
            await until(lambda: run.engine.stats().running == 0)
            assert run.engine.stats().blocks_free == run.engine.stats().blocks_total

    asyncio.run(scenario())


def test_text_that_only_began_a_stop_string_comes_out_at_the_end() -> None:
    async def scenario() -> None:
        async with running(says("abc END")) as run:
            answer = await ask(run.stub, stop=["ENDING"])
            assert answer.text == "abc END"
            assert not answer.finished.HasField("stop")
            shown = [delta.text for delta in answer.deltas]
            assert shown[-1] == "END"  # held back until the end

    asyncio.run(scenario())


def test_a_stop_string_that_spans_more_than_ascii() -> None:
    async def scenario() -> None:
        async with running(says("good 🙂 day")) as run:
            answer = await ask(run.stub, stop=["🙂 d"])
            assert (answer.text, answer.finished.stop) == ("good ", "🙂 d")

    asyncio.run(scenario())


def test_many_streams_at_once_each_get_their_own() -> None:
    async def scenario() -> None:
        async with running() as run:
            texts = [f"prompt number {index} " * (1 + index % 5) for index in range(40)]
            answers = await asyncio.gather(*(ask(run.stub, text, max_tokens=200) for text in texts))
            assert [answer.text for answer in answers] == texts

    asyncio.run(scenario())


def test_cancelling_half_of_the_streams_frees_them_and_the_rest_finish() -> None:
    async def scenario() -> None:
        async with running(says("x" * 50, end=False), max_batch=32) as run:

            async def leave() -> None:
                call = run.stub.Generate(nitsum_pb2.GenerateRequest(text="p", max_tokens=5000))
                for _ in range(3):
                    await call.read()
                call.cancel()

            stay = asyncio.gather(*(ask(run.stub, max_tokens=150) for _ in range(16)))
            await asyncio.gather(*(leave() for _ in range(16)))
            answers = await stay
            assert all(len(answer.ids) == 150 for answer in answers)
            await until(lambda: run.engine.stats().running == 0)
            assert run.engine.stats().blocks_free == run.engine.stats().blocks_total
            assert len(set(run.engine.cancels)) == 16
            assert run.router.open_streams == 0

    asyncio.run(scenario())


def test_a_client_that_vanishes_is_cancelled_in_the_engine() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            async with grpc.aio.insecure_channel(run.address) as other:
                path = "/nitsum.v1.GenerationService/Generate"
                call = other.unary_stream(path)(
                    nitsum_pb2.GenerateRequest(text="p", max_tokens=100_000).SerializeToString()
                )
                await call.read()
                await until(lambda: run.engine.stats().running == 1)
            await until(lambda: run.engine.stats().running == 0)
            assert run.engine.stats().tokens_generated < 100_000

    asyncio.run(scenario())


def test_cancelled_in_the_queue() -> None:
    async def scenario() -> None:
        async with running() as run:
            run.engine.hold()
            call = run.stub.Generate(nitsum_pb2.GenerateRequest(text="p"))
            assert (await call.read()).HasField("started")
            call.cancel()
            await until(lambda: run.engine.stats().waiting == 0)
            run.engine.release()
            assert (await ask(run.stub, "next")).text == "next"

    asyncio.run(scenario())


def test_deadline_frees_the_request() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            request = nitsum_pb2.GenerateRequest(text="p", max_tokens=100_000)
            call = run.stub.Generate(request, timeout=0.2)
            error = await refusal(_drained(call))
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: run.engine.stats().running == 0)
            assert run.engine.requests[-1].deadline_s is not None

    asyncio.run(scenario())


def test_a_full_queue_refuses_with_a_hint_and_recovers() -> None:
    async def scenario() -> None:
        async with running(max_queue=2) as run:
            run.engine.hold()
            waiting = [asyncio.create_task(ask(run.stub, f"p{index}")) for index in range(2)]
            await until(lambda: run.engine.stats().waiting == 2)
            error = await refusal(ask(run.stub))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "full" in error.details()
            hints = dict(error.trailing_metadata())
            assert 100 <= int(hints["retry-after-ms"]) <= 10_000
            run.engine.release()
            assert [(await task).text for task in waiting] == ["p0", "p1"]
            assert (await ask(run.stub, "again")).text == "again"

    asyncio.run(scenario())


def test_started_tells_how_many_were_waiting() -> None:
    async def scenario() -> None:
        async with running() as run:
            run.engine.hold()
            first = asyncio.create_task(ask(run.stub))
            await until(lambda: run.engine.stats().waiting == 1)
            second = asyncio.create_task(ask(run.stub))
            await until(lambda: run.engine.stats().waiting == 2)
            run.engine.release()
            assert [(await task).started.queued_before for task in (first, second)] == [0, 1]

    asyncio.run(scenario())


def test_a_slow_reader_gets_everything_in_few_messages_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        async with running(says("word " * 10, end=False), max_batch=4, tokens_per_step=50, context=10**6) as run:
            options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
            async with grpc.aio.insecure_channel(run.address, options=options) as other:
                path = "/nitsum.v1.GenerationService/Generate"
                request = nitsum_pb2.GenerateRequest(text="p", max_tokens=50_000).SerializeToString()
                call = other.unary_stream(path, response_deserializer=nitsum_pb2.GenerateResponse.FromString)(request)
                await call.read()
                # It does not read while the engine makes 1000 steps of 50 tokens.
                assert (await ask(run.stub, max_tokens=500)).finished.usage.output_tokens == 500
                await until(lambda: run.engine.stats().running == 0, limit_s=30)
                messages, tokens = 0, 0
                while (response := await call.read()) is not grpc.aio.EOF:
                    messages += 1
                    tokens += len(response.delta.token_ids)
                assert tokens == 50_000
                assert messages < 700

    asyncio.run(scenario())


def test_an_engine_failure_ends_only_its_own_stream() -> None:
    def script(request: Request) -> Sequence[int]:
        return [65, 65, -1] if len(request.prompt_ids) == 1 else echo(request)

    async def scenario() -> None:
        async with running(script) as run:
            fine = asyncio.create_task(ask(run.stub, "a long enough prompt"))
            error = await refusal(ask(run.stub, "p"))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert error.details() == "the fake broke"
            assert (await fine).text == "a long enough prompt"

    asyncio.run(scenario())


def test_closing_the_engine_under_a_stream_says_unavailable() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            call = asyncio.create_task(ask(run.stub, max_tokens=10_000))
            await until(lambda: run.engine.stats().running == 1)
            await asyncio.to_thread(run.engine.close)
            assert (await refusal(call)).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_one_call_into_the_loop_per_step() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        calls = 0

        class Counting(StreamRouter):
            def _dispatch(self, deltas: tuple[TokenDelta, ...]) -> None:
                nonlocal calls
                calls += 1
                super()._dispatch(deltas)

        class Nothing:
            def submit(self, request: Request) -> None: ...
            def cancel(self, request_id: str) -> None: ...

        router = Counting(loop)
        with (
            router.stream(Nothing(), Request("a", (1,), 4)) as one,
            router.stream(Nothing(), Request("b", (1,), 4)) as two,
        ):
            deltas = [TokenDelta(name, (7,), 0.0) for name in ("a", "b", "gone", "a")]
            await asyncio.to_thread(router.sink, deltas)
            assert [delta.token_ids for delta in await one.next()] == [(7,), (7,)]
            assert len(await two.next()) == 1
        assert calls == 1

    asyncio.run(scenario())


def test_the_retry_hint_follows_the_pace_at_which_requests_end() -> None:
    async def scenario() -> None:
        now = 0.0
        router = StreamRouter(asyncio.get_running_loop(), clock=lambda: now)
        assert router.retry_after_s() == 1.0
        for _ in range(50):
            now += 4.0
            router._dispatch((TokenDelta("a", (), now, FinishReason.STOP), TokenDelta("b", (), now, FinishReason.STOP)))
        assert router.retry_after_s() == pytest.approx(2.0)
        for _ in range(50):
            now += 1000.0
            router._dispatch((TokenDelta("a", (), now, FinishReason.STOP),))
        assert router.retry_after_s() == 10.0

    asyncio.run(scenario())


def test_a_sink_after_the_end_of_the_loop_is_quiet() -> None:
    async def make() -> StreamRouter:
        return StreamRouter(asyncio.get_running_loop())

    asyncio.run(make()).sink([TokenDelta("a", (1,), 0.0)])


def test_there_is_no_time_without_the_tokens_that_it_needs() -> None:
    times = OutputTimes(arrival_s=10.0)
    times.add(0, 10.5)
    assert (times.ttft_ms, times.tpot_ms) == (None, None)


def test_tpot_counts_the_tokens_after_the_first() -> None:
    times = OutputTimes(arrival_s=10.0)
    seen = []
    for tokens, time_s in ((1, 11.0), (4, 13.0)):
        times.add(tokens, time_s)
        seen.append((times.ttft_ms, times.tpot_ms))
    assert seen == [(1000.0, None), (1000.0, 500.0)]


async def _drained(call: grpc.aio.UnaryStreamCall) -> None:
    async for _ in call:
        pass


def test_bias_least_tokens_and_log_probabilities_go_through() -> None:
    async def scenario() -> None:
        async with running(says("abcd")) as run:
            sampling = nitsum_pb2.SamplingParams(logit_bias={7: -100.0, 9: 2.5})
            answer = await ask(run.stub, sampling=sampling, min_tokens=3, logprobs=2)
            request = run.engine.requests[-1]
            assert dict(request.sampling.logit_bias) == {7: -100.0, 9: 2.5}
            assert (request.min_tokens, request.logprobs) == (3, 2)
            told = [logprob for delta in answer.deltas for logprob in delta.logprobs]
            assert [one.token_id for one in told] == answer.ids
            for one in told:
                expected = fake_logprob(one.token_id, 2)
                assert one.logprob == expected.logprob
                assert [(other.token_id, other.logprob) for other in one.top] == list(expected.top)
            none = await ask(run.stub)
            unasked = run.engine.requests[-1]
            assert unasked.logprobs is None
            assert not [logprob for delta in none.deltas for logprob in delta.logprobs]
            zero = await ask(run.stub, logprobs=0)
            assert run.engine.requests[-1].logprobs == 0
            assert not any(logprob.top for delta in zero.deltas for logprob in delta.logprobs)

    asyncio.run(scenario())
