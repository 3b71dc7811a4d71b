"""JetStream's protocol, spoken as its clients and its benchmark speak it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from nitsum_jax.runtime.calls import derived_seed
from nitsum_jax.server.proto import jetstream_pb2, jetstream_pb2_grpc
from tests.server.harness import EOS, TOKENIZER, Running, ask, refusal, running, says, until

_TOKENS = jetstream_pb2.DecodeRequest.TokenContent
_TEXT = jetstream_pb2.DecodeRequest.TextContent


def _stub(run: Running) -> jetstream_pb2_grpc.OrchestratorStub:
    return jetstream_pb2_grpc.OrchestratorStub(run.channel)


async def _decode(run: Running, **fields: Any) -> list[jetstream_pb2.DecodeResponse]:
    return [response async for response in _stub(run).Decode(jetstream_pb2.DecodeRequest(**fields), timeout=20)]


async def _as_the_benchmark(stub: jetstream_pb2_grpc.OrchestratorStub, ids: list[int], max_tokens: int) -> list[int]:
    """Its loop: token ids go in, and of every message the first sample's ids are read, without looking at anything."""
    request = jetstream_pb2.DecodeRequest(token_content=_TOKENS(token_ids=ids), max_tokens=max_tokens)
    output: list[int] = []
    async for response in stub.Decode(request):
        output.extend(response.stream_content.samples[0].token_ids)
    return output


def test_numbers_that_clients_in_the_field_rely_on() -> None:
    service = jetstream_pb2.DESCRIPTOR.services_by_name["Orchestrator"]
    assert service.full_name == "jetstream_proto.Orchestrator"
    assert [(m.name, m.input_type.name, m.output_type.name) for m in service.methods] == [
        ("Decode", "DecodeRequest", "DecodeResponse"),
        ("HealthCheck", "HealthCheckRequest", "HealthCheckResponse"),
    ]
    request = jetstream_pb2.DecodeRequest(
        max_tokens=1,
        token_content=_TOKENS(token_ids=[2]),
        metadata=jetstream_pb2.DecodeRequest.Metadata(start_time=0.5),
        num_samples=3,
        lora_adapter_id="a",
        has_bos=True,
    )
    assert request.SerializeToString(deterministic=True) == bytes.fromhex(
        "2001"  # 4: 1
        "32030a0102"  # 6: {1: packed [2]}
        "3a050d0000003f"  # 7: {1: 0.5f}
        "4003"  # 8: 3
        "4a0161"  # 9: "a"
        "5001"  # 10: true
    )
    assert jetstream_pb2.DecodeRequest.FromString(bytes.fromhex("2a030a0161")).text_content.text == "a"
    response = jetstream_pb2.DecodeResponse.FromString(bytes.fromhex("1a080a060a0162120102"))
    assert response.stream_content.samples[0].text == "b"
    assert list(response.stream_content.samples[0].token_ids) == [2]
    assert jetstream_pb2.HealthCheckResponse.FromString(b"\x08\x01").is_live


def test_the_benchmark_gets_its_tokens() -> None:
    async def scenario() -> None:
        async with running(says("answer", end=False), max_batch=16) as run:
            stub = _stub(run)
            prompt = TOKENIZER.encode("prompt")
            answers = await asyncio.gather(*(_as_the_benchmark(stub, prompt, 50) for _ in range(16)))
            expected = (TOKENIZER.encode("answer") * 9)[:50]
            assert answers == [expected] * 16
            (first, *_) = run.engine.requests
            assert first.prompt_ids == tuple(prompt)
            assert (first.sampling.temperature, first.tier) == (0.0, "standard")

    asyncio.run(scenario())


def test_tokens_in_ids_out_and_text_in_both_out() -> None:
    async def scenario() -> None:
        async with running(says("añ🙂b")) as run:
            messages = await _decode(run, token_content=_TOKENS(token_ids=[65]))
            samples = [message.stream_content.samples for message in messages]
            assert [len(each) for each in samples] == [1] * len(messages)
            assert all(each[0].text == "" for each in samples)
            assert [token for each in samples for token in each[0].token_ids] == TOKENIZER.encode("añ🙂b")
            messages = await _decode(run, text_content=_TEXT(text="p"))
            samples = [message.stream_content.samples for message in messages]
            assert "".join(each[0].text for each in samples) == "añ🙂b"
            assert all("�" not in each[0].text for each in samples)
            assert [token for each in samples for token in each[0].token_ids] == TOKENIZER.encode("añ🙂b")
            assert {message.WhichOneof("content") for message in messages} == {"stream_content"}

    asyncio.run(scenario())


def test_several_samples_are_told_apart() -> None:
    async def scenario() -> None:
        async with running(lambda request: [65 + (request.sampling.seed or 0) % 50] * 5 + [EOS]) as run:
            messages = await _decode(run, text_content=_TEXT(text="p"), num_samples=3)
            assert {len(message.stream_content.samples) for message in messages} == {3}
            outputs: list[list[int]] = [[], [], []]
            for message in messages:
                for index, sample in enumerate(message.stream_content.samples):
                    outputs[index].extend(sample.token_ids)
            seeds = [request.sampling.seed or 0 for request in run.engine.requests]
            assert outputs == [[65 + seed % 50] * 5 for seed in seeds]
            assert seeds == [seeds[0], derived_seed(seeds[0], 1), derived_seed(seeds[0], 2)]
            assert {request.sampling.temperature for request in run.engine.requests} == {1.0}

    asyncio.run(scenario())


def test_max_tokens_and_its_default() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False)) as run:
            for given, expected in ((0, 256), (7, 7)):
                messages = await _decode(run, text_content=_TEXT(text="p"), max_tokens=given)
                assert sum(len(message.stream_content.samples[0].token_ids) for message in messages) == expected

    asyncio.run(scenario())


def test_the_start_token_is_put_before_a_prompt_once_and_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TOKENIZER.encode

    def encode(text: str, add_special: bool = True) -> list[int]:
        return [250, *plain(text)] if add_special else plain(text)

    monkeypatch.setattr(TOKENIZER, "encode", encode)

    async def scenario() -> None:
        async with running(says("x")) as run:
            for fields, expected in (
                ({"token_content": _TOKENS(token_ids=[65])}, (250, 65)),
                ({"token_content": _TOKENS(token_ids=[250, 65])}, (250, 65)),
                ({"token_content": _TOKENS(token_ids=[65]), "has_bos": True}, (65,)),
                ({"text_content": _TEXT(text="a")}, (250, *plain("a"))),
                ({"text_content": _TEXT(text="a"), "has_bos": True}, tuple(plain("a"))),
            ):
                await _decode(run, **fields)
                assert run.engine.requests[-1].prompt_ids == expected

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("fields", "says_what"),
    [
        ({}, "no prompt"),
        ({"text_content": _TEXT()}, "prompt is empty"),
        ({"token_content": _TOKENS()}, "prompt is empty"),
        ({"token_content": _TOKENS(token_ids=[-1])}, "outside the vocabulary"),
        ({"token_content": _TOKENS(token_ids=[257])}, "outside the vocabulary"),
        ({"text_content": _TEXT(text="p"), "max_tokens": -1}, "max_tokens=-1"),
        ({"text_content": _TEXT(text="p"), "num_samples": -1}, "num_samples=-1"),
        ({"text_content": _TEXT(text="p"), "num_samples": 129}, "num_samples=129"),
        ({"text_content": _TEXT(text="p"), "lora_adapter_id": "mine"}, "lora_adapter_id"),
        ({"text_content": _TEXT(text="x" * 3000)}, "3000 tokens"),
    ],
    ids=lambda value: str(value)[:40].replace("\n", " "),
)
def test_wrong_requests_are_refused_in_one_line(fields: dict[str, Any], says_what: str) -> None:
    async def scenario() -> None:
        async with running(says("x")) as run:
            error = await refusal(_decode(run, **fields))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert says_what in error.details()
            assert run.router.open_streams == 0

    asyncio.run(scenario())


def test_health_cancel_and_a_full_queue() -> None:
    async def scenario() -> None:
        async with running(says("x", end=False), max_queue=4) as run:
            stub = _stub(run)
            assert (await stub.HealthCheck(jetstream_pb2.HealthCheckRequest())).is_live
            request = jetstream_pb2.DecodeRequest(text_content=_TEXT(text="p"), num_samples=4, max_tokens=100_000)
            call = stub.Decode(request)
            assert len((await call.read()).stream_content.samples) == 4
            call.cancel()
            await until(lambda: run.engine.stats().running == 0)
            run.engine.hold()
            request.num_samples = 5  # more than the queue ever holds: trying again would not help
            error = await refusal(stub.Decode(request).read())
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (error.details() or "").startswith("num_samples=5 is too large: at most 4 requests may wait")
            others = [asyncio.create_task(ask(run.stub, max_tokens=1)) for _ in range(2)]
            await until(lambda: run.engine.stats().waiting == 2)
            request.num_samples = 3  # more than it has room for now: none of them stays in it
            error = await refusal(stub.Decode(request).read())
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "retry-after-ms" in dict(error.trailing_metadata())
            await until(lambda: run.engine.stats().waiting == 2)
            run.engine.release()
            await asyncio.gather(*others)
            await run.server.drain(1.0)
            assert not (await stub.HealthCheck(jetstream_pb2.HealthCheckRequest())).is_live
            assert (await refusal(stub.Decode(request).read())).code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(scenario())


def test_reflection_lists_it() -> None:
    async def scenario() -> None:
        async with running() as run:

            async def asks() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
                yield reflection_pb2.ServerReflectionRequest(list_services="")
                yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="jetstream_proto.Orchestrator")

            stub = reflection_pb2_grpc.ServerReflectionStub(run.channel)
            answers = [answer async for answer in stub.ServerReflectionInfo(asks())]
            names = {service.name for service in answers[0].list_services_response.service}
            assert {"jetstream_proto.Orchestrator", "nitsum.v1.GenerationService"} <= names
            assert answers[1].file_descriptor_response.file_descriptor_proto

    asyncio.run(scenario())
