"""A real gRPC server on a free port over a fake engine, and calls to it."""

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from nitsum_jax.engine.request import Request
from nitsum_jax.engine.step.masks import mask_words
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.models.text.chat import render_chat
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.models.text.tokenizer import Tokenizer
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.streams.router import StreamRouter
from nitsum_jax.runtime.structured.compiler import FormCompiler
from nitsum_jax.runtime.tools.formats import format_of, thinks
from nitsum_jax.server.grpc.server import GrpcServer
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from tests.server.fake_engine import FakeEngine, Script

EOS = 256
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and an end token: every character beyond ASCII is spread over several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = HfTokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(inner, bos_id=None, eos_ids=[EOS], chat_template=TEMPLATE)


TOKENIZER = byte_tokenizer()
FORMS = FormCompiler(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.eos_ids)


def served_model(
    chat: bool = True,
    defaults: GenerationDefaults = GenerationDefaults(),
    template: str = TEMPLATE,
    pooling: Pooling | None = None,
) -> ServedModel:
    def render(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        return render_chat(template, messages, options)

    return ServedModel(
        "fake",
        TOKENIZER,
        TOKENIZER.vocab_size,
        TOKENIZER.eos_ids,
        render if chat else None,
        defaults,
        FORMS,
        format_of(template),
        thinks(template),
        pooling,
    )


def says(text: str, end: bool = True) -> Script:
    """A script that answers every request with this text, over and over if it does not end."""
    ids = TOKENIZER.encode(text) + ([EOS] if end else [])
    return lambda request: ids


def echo(request: Request) -> Sequence[int]:
    """A script that says the prompt once."""
    return (*request.prompt_ids, EOS)


def held(request: Request) -> Sequence[int]:
    """A script that says something which the form of the request allows; without one it says hello."""
    if request.form is None:
        return (*TOKENIZER.encode("hello"), EOS)
    rng, matcher = random.Random(request.sampling.seed), request.form.matcher()
    said: list[int] = []
    mask = np.zeros(mask_words(TOKENIZER.vocab_size), np.int32)
    printable = {token for char in range(32, 127) for token in TOKENIZER.encode(chr(char))}
    while not matcher.ended and len(said) < 500:
        matcher.allowed(mask)
        bits = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        said.append(rng.choice([token for token in bits if token in printable] or bits))
        matcher.accept(said[-1])
    return (*said, EOS)


@dataclasses.dataclass
class Running:
    """A server under test."""

    server: GrpcServer
    engine: FakeEngine
    router: StreamRouter
    channel: grpc.aio.Channel
    stub: nitsum_pb2_grpc.GenerationServiceStub

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextlib.asynccontextmanager
async def running(
    script: Script = echo,
    chat: bool = True,
    defaults: GenerationDefaults = GenerationDefaults(),
    template: str = TEMPLATE,
    pooling: Pooling | None = None,
    **options: Any,
) -> AsyncIterator[Running]:
    server = GrpcServer("127.0.0.1", 0)
    await server.start()
    router = StreamRouter(asyncio.get_running_loop())
    engine = FakeEngine(router.sink, script, **options)
    try:
        await server.serve(Backend(engine, served_model(chat, defaults, template, pooling), router))
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Running(server, engine, router, channel, nitsum_pb2_grpc.GenerationServiceStub(channel))
    finally:
        await server.stop()
        engine.close()


@dataclasses.dataclass
class Answer:
    started: nitsum_pb2.Started
    deltas: list[nitsum_pb2.TokenDelta]
    finished: nitsum_pb2.Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


async def ask(stub: nitsum_pb2_grpc.GenerationServiceStub, text: str = "hello", **fields: Any) -> Answer:
    """One whole call; checks the order of its messages."""
    if "chat" not in fields and "tokens" not in fields:
        fields["text"] = text
    events = [event async for event in stub.Generate(nitsum_pb2.GenerateRequest(**fields), timeout=20)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds == ["started", *["delta"] * (len(events) - 2), "finished"]
    return Answer(events[0].started, [event.delta for event in events[1:-1]], events[-1].finished)


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    assert isinstance(error, grpc.aio.AioRpcError)
    assert "\n" not in (error.details() or "")
    return error


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    """Waits for a condition that another thread brings about."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.002)
