import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nitsum_jax.engine.request import Request
from nitsum_jax.errors import MAX_DETAIL
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import ask, refusal, running, says

_GENERATE = "/nitsum.v1.GenerationService/Generate"
_INVALID, _PRECONDITION = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION


def _tokens(*ids: int) -> dict[str, Any]:
    return {"tokens": nitsum_pb2.TokenPrompt(ids=ids)}


def _chat(*turns: tuple[str, str]) -> dict[str, Any]:
    messages = [nitsum_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    return {"chat": nitsum_pb2.ChatPrompt(messages=messages)}


def _sampling(**values: Any) -> dict[str, Any]:
    return {"sampling": nitsum_pb2.SamplingParams(**values)}


@pytest.mark.parametrize(
    ("fields", "says_what"),
    [
        ({"text": ""}, "prompt is empty"),
        (_tokens(), "prompt is empty"),
        (_chat(), "prompt is empty"),
        (_chat(("", "hi")), "role"),
        (_tokens(5, 257), "outside the vocabulary"),
        (_tokens(-1), "outside the vocabulary"),
        ({"text": "x" * 3000}, "3000 tokens"),
        ({"text": "x" * 6000}, "6000 tokens"),  # long enough to be tokenized beside the event loop
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": -5}, "max_tokens=-5"),
        (_sampling(temperature=-0.1), "temperature=-0.1"),
        (_sampling(temperature=float("nan")), "temperature=nan"),
        (_sampling(temperature=float("inf")), "temperature=inf"),
        (_sampling(top_k=-1), "top_k=-1"),
        (_sampling(top_p=0.0), "top_p=0.0"),
        (_sampling(top_p=1.1), "top_p=1.1"),
        (_sampling(min_p=-0.1), "min_p"),
        (_sampling(repetition_penalty=0.0), "repetition_penalty"),
        (_sampling(presence_penalty=1e9), "presence_penalty"),
        (_sampling(frequency_penalty=float("-inf")), "frequency_penalty"),
        (_sampling(seed=-1), "seed=-1"),
        (_sampling(seed=2**32), "seed=4294967296"),
        ({"tier": "gold"}, "'gold'"),
        ({"tier": "g" * 100_000}, "tier"),
        ({"stop": [""]}, "stop string"),
        ({"stop": ["x" * 257]}, "256"),
        ({"stop": [str(number) for number in range(17)]}, "at most 16"),
        ({"stop_token_ids": [257]}, "stop token id 257"),
        ({"stop_token_ids": [-1]}, "stop token id -1"),
        ({"stop_token_ids": list(range(65))}, "at most 64"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_wrong_requests_are_refused_in_one_line_and_others_go_on(fields: dict[str, Any], says_what: str) -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            other = asyncio.create_task(ask(run.stub, max_tokens=60))
            error = await refusal(ask(run.stub, **fields))
            assert error.code() is _INVALID
            assert says_what in error.details()
            assert len(error.details()) <= MAX_DETAIL
            assert len((await other).ids) == 60
            assert run.router.open_streams == 0

    asyncio.run(scenario())


def test_no_prompt_at_all() -> None:
    async def scenario() -> None:
        async with running() as run:
            call = run.stub.Generate(nitsum_pb2.GenerateRequest(max_tokens=3))
            error = await refusal(call.read())
            assert (error.code(), "no prompt" in error.details()) == (_INVALID, True)

    asyncio.run(scenario())


def test_what_does_not_fit_the_pool_or_the_model_is_a_failed_precondition() -> None:
    async def scenario() -> None:
        async with running(chat=False, blocks_total=4) as run:
            error = await refusal(ask(run.stub, max_tokens=500))
            assert (error.code(), "KV pool" in error.details()) == (_PRECONDITION, True)
            error = await refusal(ask(run.stub, **_chat(("user", "hi"))))
            assert (error.code(), "chat template" in error.details()) == (_PRECONDITION, True)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("layout", "code"),
    [
        ("", _INVALID),
        ("tp3", _INVALID),
        ("four", _INVALID),
        ("tp8", _PRECONDITION),
        ("tp2", _PRECONDITION),
        ("tp1" + "+tp1" * 100_000, _INVALID),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_layouts_are_refused_and_change_nothing(layout: str, code: grpc.StatusCode) -> None:
    async def scenario() -> None:
        async with running() as run:
            error = await refusal(run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=layout)))
            assert error.code() is code
            assert str(run.engine.layout()) == "tp1x4"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x04\xff\xfe\xfd\xfc",  # text = bytes that are not UTF-8
        b"\x4a\x02\xc3\x28",  # tier
        b"\x0a\x7f",  # a length beyond the end
        b"\xff" * 30,
    ],
)
def test_bytes_that_are_no_message_are_an_invalid_argument(data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running() as run:
            error = await refusal(run.channel.unary_stream(_GENERATE)(data).read())
            assert error.code() is _INVALID
            assert "UTF-8" in error.details()
            for path in ("/nitsum.v1.GenerationService/SetLayout", "/grpc.health.v1.Health/Check"):
                error = await refusal(run.channel.unary_unary(path)(b"\x0a\x02\xc3\x28"))
                assert error.code() is _INVALID
            assert (await ask(run.stub, "still here")).text == "still here"

    asyncio.run(scenario())
    assert not caplog.records


def test_a_message_over_the_limit_is_refused_and_the_server_goes_on() -> None:
    async def scenario() -> None:
        async with running() as run:
            error = await refusal(ask(run.stub, "x" * (5 * 2**20)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert (await ask(run.stub, "still here")).text == "still here"

    asyncio.run(scenario())


def test_unknown_methods_are_unimplemented() -> None:
    async def scenario() -> None:
        async with running() as run:
            error = await refusal(run.channel.unary_unary("/nitsum.v1.GenerationService/Nothing")(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(scenario())


def test_a_bug_is_internal_with_the_trace_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Request) -> list[int]:
        raise ZeroDivisionError("secret\ndetails")

    async def scenario() -> None:
        async with running(broken) as run:
            error = await refusal(ask(run.stub))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert error.details() == "internal error (ZeroDivisionError): see the server's log"
            answer = await health_pb2_grpc.HealthStub(run.channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING

    asyncio.run(scenario())
    assert "ZeroDivisionError: secret" in caplog.text


def test_mutated_messages_never_hang_and_leave_nothing_behind() -> None:
    """Every byte of a real request changed in a few ways; the server answers each with an output or a refusal."""
    message = nitsum_pb2.GenerateRequest(text="hé", max_tokens=5, stop=["zz"], tier="batch", stop_token_ids=[7, 9])
    message.sampling.temperature = 0.5
    message.sampling.seed = 7
    data = message.SerializeToString()
    changes: list[Callable[[int], int]] = [lambda b: b ^ 0xFF, lambda b: b ^ 0x08, lambda b: b + 1, lambda b: 0x7F]
    mutants = [
        data[:position] + bytes([change(data[position]) & 0xFF]) + data[position + 1 :]
        for position in range(len(data))
        for change in changes
    ] + [data[:position] for position in range(len(data))]

    async def scenario() -> None:
        codes = set()
        async with running(says("answer"), max_queue=1000) as run:
            for mutant in mutants:
                call = run.channel.unary_stream(_GENERATE)(mutant, timeout=10)
                try:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                except grpc.aio.AioRpcError:
                    pass
                codes.add(await call.code())
            assert run.router.open_streams == 0
            assert (run.engine.stats().running, run.engine.stats().waiting) == (0, 0)
        assert codes == {grpc.StatusCode.OK, _INVALID}

    asyncio.run(scenario())
