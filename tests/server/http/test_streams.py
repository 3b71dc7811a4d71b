"""Streams: text, stop strings, clients that leave or do not read, and the end of the server."""

import asyncio
import contextlib
import json
import socket
from typing import Any

import httpx2
import pytest

from nitsum_jax.server.http import protocol
from tests.server.harness import TOKENIZER, ask, says, until
from tests.server.http.harness import CHAT, HELLO, Serving, chat_text, events_of, serving


@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_a_stop_string_over_token_borders(tokens_per_step: int) -> None:
    async def scenario() -> None:
        script = says("good 🙂 day, all", end=False)
        async with serving(script, tokens_per_step=tokens_per_step) as run:
            for stop, text in (("🙂 d", "good "), (["nope", " day,"], "good 🙂")):
                events = await run.events(stop=stop, max_tokens=1000)
                assert chat_text(events) == text
                last = events[-1]["choices"][0]
                assert (last["finish_reason"], last["stop_reason"]) == (
                    "stop",
                    stop if isinstance(stop, str) else " day,",
                )
                whole = (await run.chat(stop=stop, max_tokens=1000)).json()["choices"][0]
                assert (whole["message"]["content"], whole["finish_reason"]) == (text, "stop")
            await until(lambda: run.engine.stats().running == 0)

    asyncio.run(scenario())


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    async def scenario() -> None:
        async with serving(says("abXcdXef")) as run:
            assert (await run.complete(stop="X")).json()["choices"][0]["text"] == "ab"
            assert (await run.complete(stop="X", min_tokens=3)).json()["choices"][0]["text"] == "abXcd"

    asyncio.run(scenario())


def test_a_character_that_never_completes_comes_at_the_end() -> None:
    async def scenario() -> None:
        async with serving(says("añ🙂", end=False)) as run:
            events = await run.events(max_tokens=5)
            assert chat_text(events) == "añ�"
            assert events[-1]["choices"][0]["finish_reason"] == "length"

    asyncio.run(scenario())


def test_every_answer_of_a_stream_is_whole_and_told_once() -> None:
    async def scenario() -> None:
        async with serving(says("añ🙂b"), max_batch=4) as run:
            events = await run.events(n=8, stream_options={"include_usage": True})
            assert [chat_text(events, index) for index in range(8)] == ["añ🙂b"] * 8
            ends = [c["index"] for e in events for c in e["choices"] if c["finish_reason"] is not None]
            assert sorted(ends) == list(range(8))
            assert events[-1]["usage"]["completion_tokens"] == 8 * len(TOKENIZER.encode("añ🙂b"))
            assert events[-1]["usage"]["prompt_tokens"] == len(TOKENIZER.encode("<user>hello<assistant>"))

    asyncio.run(scenario())


def test_both_front_ends_and_many_streams_at_once() -> None:
    async def scenario() -> None:
        async with serving(max_batch=32, max_queue=100) as run:
            texts = [f"prompt number {index} " * (1 + index % 5) for index in range(30)]
            streams = [run.events("/v1/completions", prompt=text, max_tokens=200) for text in texts]
            wholes = [run.complete(text, max_tokens=200) for text in texts]
            calls = [ask(run.grpc.stub, text, max_tokens=200) for text in texts]
            got = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*wholes), asyncio.gather(*calls))
            assert ["".join(c["text"] for e in events for c in e["choices"]) for events in got[0]] == texts
            assert [response.json()["choices"][0]["text"] for response in got[1]] == texts
            assert [answer.text for answer in got[2]] == texts
            assert run.grpc.router.open_streams == 0

    asyncio.run(scenario())


def test_five_hundred_streams_at_once() -> None:
    async def scenario() -> None:
        async with serving(says("ab", end=False), max_batch=512, max_queue=600) as run:
            sockets = [await _post(run, stream=True, max_tokens=20) for _ in range(250)]
            calls = [asyncio.create_task(ask(run.grpc.stub, max_tokens=20)) for _ in range(250)]
            raw = await asyncio.gather(*(_read_all(one) for one in sockets))
            bodies = [_unchunked(each.partition(b"\r\n\r\n")[2]).decode() for each in raw]
            assert [chat_text(events_of(body)) for body in bodies] == ["ab" * 10] * 250
            assert [(await call).text for call in calls] == ["ab" * 10] * 250
            assert run.grpc.router.open_streams == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_is_cancelled_in_the_engine(stream: bool, how: str) -> None:
    async def scenario() -> None:
        async with serving(says("x", end=False), context=10**6, max_batch=32) as run:
            other = asyncio.create_task(run.chat(max_tokens=300))
            sockets = [await _post(run, stream=stream, max_tokens=500_000, n=2) for _ in range(5)]
            await until(lambda: run.engine.stats().running == 11)
            for one in sockets:
                if how == "reset":
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                one.close()
            await until(lambda: len(set(run.engine.cancels)) == 10)
            assert (await other).json()["usage"]["completion_tokens"] == 300
            await until(lambda: run.engine.stats().running == 0)
            assert run.engine.stats().blocks_free == run.engine.stats().blocks_total
            assert run.grpc.router.open_streams == 0
            await until(lambda: run.http.connections <= 1)

    asyncio.run(scenario())


def test_leaving_the_queue() -> None:
    async def scenario() -> None:
        async with serving() as run:
            run.engine.hold()
            one = await _post(run, stream=True)
            await until(lambda: run.engine.stats().waiting == 1)
            one.close()
            await until(lambda: run.engine.stats().waiting == 0)
            run.engine.release()
            assert (await run.chat()).status_code == 200

    asyncio.run(scenario())


def test_a_slow_reader_gets_everything_in_few_events_and_holds_up_nobody() -> None:
    async def scenario() -> None:
        async with serving(says("x", end=False), max_batch=4, tokens_per_step=5) as run:
            # Log probabilities make some kilobytes of every token: more than the sockets take.
            fields = {"logprobs": True, "top_logprobs": 20, "max_tokens": 1500}
            one = await _post(run, receive_buffer=4096, stream=True, **fields)
            assert (await run.chat(max_tokens=500)).json()["usage"]["completion_tokens"] == 500
            await until(lambda: run.engine.stats().running == 0, limit_s=30)
            head, _, rest = (await _read_all(one)).partition(b"\r\n\r\n")
            assert b" 200 OK" in head
            events = events_of(_unchunked(rest).decode())
            assert chat_text(events) == "x" * 1500
            told = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
            assert sum(len(logprobs["content"]) for logprobs in told) == 1500
            assert len(told) < 250  # of 300 steps

    asyncio.run(scenario())


def test_a_client_that_reads_nothing_at_all_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STALLED_S", 0.3)

    async def scenario() -> None:
        async with serving(
            says("word " * 10, end=False), tokens_per_step=500, context=10**7, blocks_total=10**6
        ) as run:
            one = await _post(run, receive_buffer=4096, stream=True, max_tokens=5_000_000)
            await until(lambda: run.http.connections == 1)
            await until(lambda: run.http.connections == 0, limit_s=20)
            await until(lambda: run.engine.stats().running == 0)
            assert run.grpc.router.open_streams == 0
            one.close()

    asyncio.run(scenario())


def test_stopping_tells_streams_and_answers_that_they_are_cut_off() -> None:
    async def scenario() -> None:
        async with serving(says("x", end=False), context=10**6) as run:
            stream = asyncio.create_task(run.client.post(CHAT, json=_body(stream=True, max_tokens=500_000)))
            whole = asyncio.create_task(run.chat(max_tokens=500_000))
            await until(lambda: run.engine.stats().running == 2)
            await run.grpc.server.stop()
            events = events_of((await stream).text)
            assert events[-1]["error"]["code"] == "unavailable"
            assert (await whole).status_code == 503
            await run.http.stop()
            with pytest.raises(httpx2.ConnectError):
                await run.client.get("/health/live")
            await until(lambda: run.engine.stats().running == 0)

    asyncio.run(scenario())


def test_a_drain_lets_streams_finish() -> None:
    async def scenario() -> None:
        async with serving(says("word ", end=False)) as run:
            stream = asyncio.create_task(run.client.post(CHAT, json=_body(stream=True, max_tokens=200)))
            await until(lambda: run.engine.stats().running == 1)
            assert await run.grpc.server.drain(10)
            assert chat_text(events_of((await stream).text)) == "word " * 40

    asyncio.run(scenario())


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": HELLO, **fields}


async def _post(run: Serving, receive_buffer: int | None = None, **fields: Any) -> socket.socket:
    """A chat request on a connection of its own, which nobody reads."""
    one = socket.socket()
    if receive_buffer is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    one.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(one, ("127.0.0.1", run.http.port))
    body = json.dumps(_body(**fields)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    await loop.sock_sendall(one, f"{head}connection: close\r\n\r\n".encode() + body)
    return one


async def _read_all(one: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    with contextlib.closing(one):
        while piece := await loop.sock_recv(one, 65536):
            data += piece
    return data


def _unchunked(data: bytes) -> bytes:
    body = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        body += data[: int(size, 16)]
        data = data[int(size, 16) + 2 :]
    return body
