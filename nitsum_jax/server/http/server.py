"""The HTTP server around the application: a life from bind to stop, on the event loop of the gRPC server."""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from nitsum_jax.errors import PreconditionError
from nitsum_jax.server.address import check_bindable
from nitsum_jax.server.http.protocol import BoundedProtocol

_KEEP_ALIVE_S = 65  # longer than most proxies keep an idle connection, so that they close it first
_BACKLOG = 2048
_LAST_WORDS_S = 0.8


class HttpServer:
    """One uvicorn server: bound at once, answering from `start` on. What it answers, its application decides."""

    def __init__(
        self, app: ASGIApp, host: str, port: int, tls: ssl.SSLContext | None = None, flag: str = "http_port"
    ) -> None:
        """Binds the port.

        Args:
          app: the application; see build_app.
          host: address of this machine.
          port: 0 takes a free one.
          tls: with it, https.
          flag: what messages call the port.

        Raises:
          InvalidInputError: `host` is not an address of this machine.
          PreconditionError: the port is in use or not allowed.
        """
        check_bindable(host, port, flag=flag)
        self.host = host
        self._sockets = _bound(host, port, flag)
        self.port: int = self._sockets[0].getsockname()[1]
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # below that it tells of every malformed request
        config = uvicorn.Config(
            app,
            http=BoundedProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=_BACKLOG,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._server.server_state.connections)

    def open_connections(self) -> list[asyncio.Transport]:
        """Their transports."""
        return [connection.transport for connection in self._server.server_state.connections]

    async def start(self) -> None:
        """Answers from now on."""
        self._task = asyncio.create_task(self._server.serve(self._sockets))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0)
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """Frees the port and hangs up; answers under way get a moment to be read. A second call does nothing.

        The outputs that are alive are the caller's to end (see `StreamRouter.cut_off`).
        """
        if self._task is None:
            for bound in self._sockets:
                bound.close()
            return
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=_LAST_WORDS_S)
        for transport in self.open_connections():
            transport.abort()
        await self._task


class _Server(uvicorn.Server):
    """uvicorn's, which leaves the signals to the launcher."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _bound(host: str, port: int, flag: str) -> list[socket.socket]:
    """Sockets on every address that the name has, all of one port."""
    found: list[socket.socket] = []
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, where in addresses:
        one = socket.socket(family, kind, protocol)
        try:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and len(addresses) > 1:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((where[0], found[0].getsockname()[1] if found else port, *where[2:]))
            one.setblocking(False)
        except OSError as error:
            one.close()
            if error.errno == errno.EADDRINUSE:  # taken since the check
                for other in found:
                    other.close()
                raise PreconditionError(f"port {port} on {host} is in use: give another --{flag}") from error
            continue  # a machine may have a name for an address that it does not have
        found.append(one)
    return found
