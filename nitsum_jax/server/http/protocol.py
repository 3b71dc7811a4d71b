"""One HTTP connection: uvicorn's, with an end to everything that a client could let go on for ever.

uvicorn leaves to a proxy in front of it what this adds: headers are bounded in size and time, a client that reads
nothing for long is cut off, and one that vanished without a word is found by the kernel.
"""

import asyncio
import logging
import socket
import time
from typing import Any, Final

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState as UvicornState

from nitsum_jax.server.http.errors import ApiError

MAX_HEAD_BYTES = 64 * 2**10
"""Longest request line and headers together."""

HEAD_S = 20.0
"""How long they may take to come."""

ARRIVAL: Final = "nitsum.arrival_s"
"""In the scope of a request: when the last of its bytes was read, time.monotonic."""

STALLED_S = 120.0
"""How long a client may read nothing while there is something to read."""

_OPTIONS: Final = (
    ("SO_KEEPALIVE", socket.SOL_SOCKET, 1),
    ("TCP_KEEPIDLE", socket.IPPROTO_TCP, 30),
    ("TCP_KEEPINTVL", socket.IPPROTO_TCP, 10),
    ("TCP_KEEPCNT", socket.IPPROTO_TCP, 3),
    ("TCP_NODELAY", socket.IPPROTO_TCP, 1),
    ("SO_SNDBUF", socket.SOL_SOCKET, 2**18),  # else the kernel keeps megabytes for clients that do not read
)


class BoundedProtocol(HttpToolsProtocol):
    """See the module."""

    def __init__(
        self,
        config: Config,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.logger = logging.getLogger("uvicorn.error")
        self._head_bytes = 0
        self._in_head = True
        self._refusal: ApiError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected, and is to send its first headers in time."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        for name, level, value in _OPTIONS:
            option = getattr(socket, name, None)
            if connection is not None and connection.family != socket.AF_UNIX and option is not None:
                connection.setsockopt(level, option, value)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, whichever side ended it."""
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of the client."""
        if self._refusal is not None or self.parser is None:
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._deadline is None:
                self._await_head()
        super().data_received(data)
        # Headers that are not complete yet; complete ones are counted by the callbacks, without the body behind them.
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and self._refusal is None:
            self._refuse()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._parsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request line."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer behind a body in chunks."""
        self._count(name + value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """All headers are there."""
        self._in_head = False
        self._head_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there; the next bytes are of another request."""
        self._in_head = True
        # Many may come at once: the handlers of the last ones then begin long after their bytes were read.
        self.scope[ARRIVAL] = time.monotonic()  # type: ignore[typeddict-unknown-key]
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are no request, or one with too long headers, and hangs up."""
        error = self._refusal or ApiError(400, f"{msg} Send HTTP/1.1.", code="invalid_http", headers=())
        self._refusal = error
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # in the midst of the answer to the request before
            return
        body = error.body()
        reason = {431: "Request Header Fields Too Large", 408: "Request Timeout"}.get(error.status, "Bad Request")
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _await_head(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self._too_slow)

    def _too_slow(self) -> None:
        self._deadline = None
        if not self._head_bytes:  # it has not begun: no client waits for an answer
            self.transport.close()
            return
        self._refusal = ApiError(408, f"the headers did not come within {HEAD_S:g} s", "timeout_error")
        self.send_400_response("")

    def _refuse(self) -> None:
        self._refusal = ApiError(
            431, f"the headers are too long: send at most {MAX_HEAD_BYTES} bytes", code="headers_too_large"
        )
        self.send_400_response("")

    def _count(self, data: bytes) -> None:
        self._parsed_bytes += len(data)
        if self._parsed_bytes > MAX_HEAD_BYTES:
            self._refusal = ApiError(
                431, f"the headers are too long: send at most {MAX_HEAD_BYTES} bytes", code="headers_too_large"
            )
            raise httptools.HttpParserError("headers too long")  # ends the parser, which then asks for the answer
