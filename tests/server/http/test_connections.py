"""What clients can do to a connection, below the requests."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator

import pytest

from nitsum_jax.server.http import body, protocol
from tests.server.harness import says, until
from tests.server.http.harness import CHAT, HELLO, Serving, serving


@contextlib.asynccontextmanager
async def _connected(run: Serving) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", run.http.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _flood(writer: asyncio.StreamWriter, piece: bytes, times: int) -> None:
    with contextlib.suppress(ConnectionError):  # the server hangs up in the midst of it
        for _ in range(times):
            writer.write(piece)
            await writer.drain()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and error of a response, whose connection then is closed."""
    head = await reader.readuntil(b"\r\n\r\n")
    error = json.loads(await reader.read())["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


async def _still_serves(run: Serving) -> None:
    assert (await run.chat(max_tokens=3)).status_code == 200


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n", b"x-flood: yes\r\n" * 100),  # many
        (b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-flood: ", b"y" * 1000),  # one that does not end
        (b"GET /v1/models", b"/x" * 500),  # the path
        (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x-t: y\r\n" * 100),
    ],
    ids=["many", "endless", "path", "trailers"],
)
def test_header_floods_are_cut_off(begin: bytes, piece: bytes) -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run, _connected(run) as (reader, writer):
            writer.write(begin)
            flood = asyncio.create_task(_flood(writer, piece, 100_000))
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                status, error = await _answer(reader)
                assert (status, error["code"]) in {(431, "headers_too_large"), (415, None)}
            await asyncio.wait_for(flood, 10)
            await _still_serves(run)

    asyncio.run(scenario())


def test_headers_of_the_largest_size_are_fine_and_a_little_more_is_not() -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run:
            response = await run.client.get("/v1/models", headers={"x-long": "y" * (protocol.MAX_HEAD_BYTES - 1000)})
            assert response.status_code == 200
            async with _connected(run) as (reader, writer):
                long = b"y" * protocol.MAX_HEAD_BYTES
                writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-long: " + long + b"\r\n\r\n")
                status, error = await _answer(reader)
                assert (status, error["code"]) == (431, "headers_too_large")

    asyncio.run(scenario())


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\x01\x00", b"hello\r\n\r\n", b"GET\r\n\r\n", b"\xff" * 50])
def test_bytes_that_are_no_http(data: bytes) -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run, _connected(run) as (reader, writer):
            writer.write(data)
            status, error = await _answer(reader)
            assert (status, error["code"]) == (400, "invalid_http")
            await _still_serves(run)

    asyncio.run(scenario())


def test_headers_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_S", 0.2)

    async def scenario() -> None:
        async with serving(says("x")) as run:
            async with _connected(run) as (reader, writer):  # it says nothing
                assert await asyncio.wait_for(reader.read(), 5) == b""
            async with _connected(run) as (reader, writer):  # it begins
                writer.write(b"GET /v1/models HTTP/1.1\r\nhost:")
                status, error = await asyncio.wait_for(_answer(reader), 5)
                assert (status, error["type"]) == (408, "timeout_error")
            async with _connected(run) as (reader, writer):  # it goes on for ever, a byte at a time
                writer.write(b"GET /v1/models HTTP/1.1\r\nx: ")
                drip = asyncio.create_task(_flood(writer, b"y", 0))
                status, _ = await asyncio.wait_for(_answer(reader), 5)
                assert status == 408
                await drip
            await _still_serves(run)

    asyncio.run(scenario())


def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_BODY_S", 0.2)

    async def scenario() -> None:
        async with serving(says("x")) as run, _connected(run) as (reader, writer):
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{"
            writer.write(head.encode())
            status, error = await asyncio.wait_for(_answer(reader), 5)
            assert (status, error["type"]) == (408, "timeout_error")
            await _still_serves(run)

    asyncio.run(scenario())


def test_a_body_without_end_is_not_kept() -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run, _connected(run) as (reader, writer):
            head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            flood = asyncio.create_task(_flood(writer, b"10000\r\n" + b"x" * 65536 + b"\r\n", 2000))
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                assert (await _answer(reader))[0] == 413
            await asyncio.wait_for(flood, 20)
            await _still_serves(run)

    asyncio.run(scenario())


def test_requests_in_a_row_on_one_connection_are_answered_in_order() -> None:
    async def scenario() -> None:
        async with serving() as run, _connected(run) as (reader, writer):
            requests = b""
            for text in ("one", "two", "three"):
                data = json.dumps({"model": "fake", "prompt": text}).encode()
                head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                requests += f"{head}content-length: {len(data)}\r\n\r\n".encode() + data
            writer.write(requests)
            texts = []
            for _ in range(3):
                head_read = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head_read.split(b"content-length: ")[1].split(b"\r\n")[0])
                texts.append(json.loads(await reader.readexactly(size))["choices"][0]["text"])
            assert texts == ["one", "two", "three"]

    asyncio.run(scenario())


def test_the_kernel_looks_for_clients_that_vanished_and_keeps_little_for_those_who_do_not_read() -> None:
    async def scenario() -> None:
        async with serving(says("x")) as run, _connected(run) as (_, writer):
            peer = writer.get_extra_info("sockname")
            await until(lambda: run.http.connections > 0)
            (one,) = [each for each in run.http.open_connections() if each.get_extra_info("peername") == peer]
            server_side = one.get_extra_info("socket")
            assert server_side.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert server_side.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
            assert server_side.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2**19

    asyncio.run(scenario())


def test_a_half_closed_connection_counts_as_left() -> None:
    async def scenario() -> None:
        async with serving(says("x", end=False), context=10**6) as run:
            async with _connected(run) as (reader, writer):
                data = json.dumps({"model": "fake", "messages": HELLO, "stream": True, "max_tokens": 500_000}).encode()
                head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
                await reader.readuntil(b"data: ")
                writer.write_eof()
                while await asyncio.wait_for(reader.read(65536), 5):
                    pass
            await _still_serves(run)
            assert run.engine.cancels

    asyncio.run(scenario())
