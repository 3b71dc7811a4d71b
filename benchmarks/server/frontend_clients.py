"""Clients that do little more than read: what they cost must not be taken for the server's.

Started by frontend.py; prints one JSON object: tokens per second while all streams were alive, the seconds of that
window, and how many streams brought all their tokens.
"""

import asyncio
import json
import pathlib
import re
import sys
import time

import grpc.aio

# As a script only this folder is on the path.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from nitsum_jax.server.proto import nitsum_pb2

GRPC, HTTP = "grpc", "http"
_SAID = re.compile(rb'"content":"(x*)"')


class Window:
    """Tokens that came between the moment when all streams had begun and the one when the first of them ended."""

    def __init__(self, streams: int, tokens: int) -> None:
        self._streams = streams
        self._expected = tokens
        self._begun = 0
        self._first_s = 0.0
        self._last_s = 0.0
        self._tokens = 0
        self.complete = 0

    def begin(self) -> None:
        """A stream has its first token."""
        self._begun += 1
        if self._begun == self._streams:
            self._first_s = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Tokens came."""
        if self._first_s and not self._last_s:
            self._tokens += tokens

    def end(self, tokens: int) -> None:
        """A stream has ended after so many tokens."""
        self.complete += tokens == self._expected
        if not self._last_s:
            self._last_s = time.perf_counter()

    def as_json(self) -> dict[str, float]:
        """The result; no rate where the streams were never alive together."""
        seconds = self._last_s - self._first_s if self._first_s else 0.0
        rate = self._tokens / seconds if seconds > 0 else 0.0
        return {"tokens_per_s": rate, "seconds": seconds, "complete": self.complete}


async def over_grpc(port: int, streams: int, tokens: int) -> Window:
    """Streams of Generate, over one channel per 100, as a proxy would."""
    window = Window(streams, tokens)
    request = nitsum_pb2.GenerateRequest(text="x", max_tokens=tokens, ignore_eos=True)

    async def one(channel: grpc.aio.Channel) -> None:
        path = "/nitsum.v1.GenerationService/Generate"
        call = channel.unary_stream(path, response_deserializer=nitsum_pb2.GenerateResponse.FromString)(
            request.SerializeToString()
        )
        got = 0
        async for response in call:
            new = len(response.delta.token_ids)
            if new and not got:
                window.begin()
            got += new
            window.add(new)
        window.end(got)

    # A pool of its own for each, or they would share one connection.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(-(-streams // 100))]
    await asyncio.gather(*(one(channels[index % len(channels)]) for index in range(streams)))
    for channel in channels:
        await channel.close()
    return window


async def over_http(port: int, streams: int, tokens: int) -> Window:
    """Streams of /v1/chat/completions, each over a connection of its own, as browsers and most clients do."""
    window = Window(streams, tokens)
    fields = {"model": "paced", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": tokens}
    body = json.dumps(fields).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    ended = [asyncio.get_running_loop().create_future() for _ in range(streams)]

    class Reader(asyncio.Protocol):
        def __init__(self, end: asyncio.Future[int]) -> None:
            self._end = end
            self._rest = b""
            self._got = 0

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.write(request)

        def data_received(self, data: bytes) -> None:
            whole, _, self._rest = (self._rest + data).rpartition(b"\n\n")
            new = sum(map(len, _SAID.findall(whole)))
            if new and not self._got:
                window.begin()
            self._got += new
            window.add(new)

        def connection_lost(self, exc: Exception | None) -> None:
            window.end(self._got)
            self._end.set_result(self._got)

    loop = asyncio.get_running_loop()
    for end in ended:
        await loop.create_connection(lambda end=end: Reader(end), "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.gather(*ended)
    return window


if __name__ == "__main__":
    run = {GRPC: over_grpc, HTTP: over_http}[sys.argv[1]]
    print(json.dumps(asyncio.run(run(int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))).as_json()))
