"""Changed and made-up bytes to every method of every gRPC service: an answer or a refusal, no INTERNAL, no hang.

NITSUM_FUZZ_CASES=10000 makes so many; without it there are enough for a look.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from nitsum_jax.models.pooling import Pooling
from nitsum_jax.server.proto import jetstream_pb2, nitsum_pb2
from tests.server.harness import Running, ask, running, says

CASES = int(os.environ.get("NITSUM_FUZZ_CASES", "600"))
_AT_ONCE = 16

_TEXT, _TOKENS = jetstream_pb2.DecodeRequest.TextContent, jetstream_pb2.DecodeRequest.TokenContent
_SAMPLING = nitsum_pb2.SamplingParams(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, seed=7, presence_penalty=0.5)
_CHAT = nitsum_pb2.ChatPrompt(messages=[nitsum_pb2.ChatMessage(role="user", content="hé")])
_SEEDS: dict[str, list[Any]] = {
    "/nitsum.v1.GenerationService/Generate": [
        nitsum_pb2.GenerateRequest(text="hé", max_tokens=5, stop=["zz"], tier="batch", sampling=_SAMPLING),
        nitsum_pb2.GenerateRequest(chat=_CHAT, stop_token_ids=[7, 9], ignore_eos=True, return_prompt_ids=True),
        nitsum_pb2.GenerateRequest(tokens=nitsum_pb2.TokenPrompt(ids=[1, 2, 200])),
        nitsum_pb2.GenerateRequest(text="a", form=nitsum_pb2.OutputForm(json_schema='{"type": "null"}'), max_tokens=9),
        nitsum_pb2.GenerateRequest(text="abc", form=nitsum_pb2.OutputForm(regex="a|b"), prompt_logprobs=2),
        nitsum_pb2.GenerateRequest(
            chat=nitsum_pb2.ChatPrompt(
                messages=_CHAT.messages,
                tools=[nitsum_pb2.Tool(name="f", parameters='{"type": "object"}')],
                tool_choice="none",
                template_variables="{}",
            ),
            split=True,
        ),
    ],
    "/nitsum.v1.GenerationService/Embed": [
        nitsum_pb2.EmbedRequest(inputs=[nitsum_pb2.EmbedInput(text="hé"), nitsum_pb2.EmbedInput(text="a")], ttft_ms=99),
        nitsum_pb2.EmbedRequest(
            inputs=[nitsum_pb2.EmbedInput(tokens=nitsum_pb2.TokenPrompt(ids=[1, 2, 200]))], tier="batch"
        ),
    ],
    "/nitsum.v1.GenerationService/GetLayout": [nitsum_pb2.GetLayoutRequest()],
    "/nitsum.v1.GenerationService/SetLayout": [
        nitsum_pb2.SetLayoutRequest(layout="tp2x2"),
        nitsum_pb2.SetLayoutRequest(layout="tp2+tp1x2", prepare=True),
    ],
    "/jetstream_proto.Orchestrator/Decode": [
        jetstream_pb2.DecodeRequest(text_content=_TEXT(text="hé"), max_tokens=5, num_samples=2, has_bos=True),
        jetstream_pb2.DecodeRequest(token_content=_TOKENS(token_ids=[1, 2, 200]), lora_adapter_id=""),
    ],
    "/jetstream_proto.Orchestrator/HealthCheck": [jetstream_pb2.HealthCheckRequest()],
    "/grpc.health.v1.Health/Check": [health_pb2.HealthCheckRequest(service="nitsum.v1.GenerationService")],
    "/grpc.health.v1.Health/Watch": [health_pb2.HealthCheckRequest(service="")],
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="jetstream_proto.Orchestrator"),
    ],
}
_FINE = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
}


def _mutant(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """A message that was right, with a few changes; now and then just bytes."""
    if rng.random() < 0.1:
        return rng.randbytes(rng.randrange(200))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[at % len(data)] = rng.randrange(256)
            case 2:
                del data[at : at + rng.randrange(8)]
            case 3:
                data[at:at] = rng.randbytes(rng.randrange(8))
            case 4:
                data[at:at] = data[at : at + rng.randrange(16)] * rng.randrange(1, 4)
            case _:
                data += rng.choice(seeds)
    return bytes(data)


async def _code(run: Running, path: str, data: bytes) -> grpc.StatusCode:
    """How a call with these bytes ends; a stream that would go on for ever is left after its first message."""
    method = path.rsplit("/", 1)[1]
    if method == "ServerReflectionInfo":

        async def requests() -> AsyncIterator[bytes]:
            yield data

        call = run.channel.stream_stream(path)(requests(), timeout=20)
    elif method in ("Generate", "Decode", "Watch"):
        call = run.channel.unary_stream(path)(data, timeout=20)
    else:
        call = run.channel.unary_unary(path)(data, timeout=20)
    try:
        if method in ("Embed", "GetLayout", "SetLayout", "HealthCheck", "Check"):
            await call
        elif method == "Watch":
            await call.read()
            call.cancel()
            return grpc.StatusCode.OK
        else:
            while await call.read() is not grpc.aio.EOF:
                pass
    except grpc.aio.AioRpcError:
        pass
    code: grpc.StatusCode = await call.code()
    return code


def test_mutants_of_every_method() -> None:
    rng = random.Random(6)
    paths = list(_SEEDS)
    seeds = {path: [message.SerializeToString() for message in _SEEDS[path]] for path in paths}
    # Half of them go to the methods that read the most.
    heavy = [path for path in paths if path.endswith(("Generate", "Decode", "Embed"))]
    picks = [rng.choice(heavy if rng.random() < 0.5 else paths) for _ in range(CASES)]
    cases = [(path, _mutant(rng, seeds[path])) for path in picks]
    found: Counter[tuple[str, grpc.StatusCode]] = Counter()

    async def scenario() -> None:
        options: dict[str, Any] = {"max_batch": 64, "max_queue": 4096, "tokens_per_step": 200, "step_s": 0.0}
        async with running(says("answer"), context=1024, pooling=Pooling.MEAN, **options) as run:
            left = iter(cases)

            async def worker() -> None:
                for path, data in left:
                    code = await _code(run, path, data)
                    assert code in _FINE, (path, data.hex(), code)
                    found[path, code] += 1

            await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))
            assert run.router.open_streams == 0
            stats = run.engine.stats()
            assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
            assert (await ask(run.stub, "still here")).text == "answer"

    asyncio.run(scenario())
    assert found.total() == CASES
    for path in heavy:  # the mutants are neither all wrong nor all right
        assert found[path, grpc.StatusCode.OK]
        assert found[path, grpc.StatusCode.INVALID_ARGUMENT]
