"""One uvicorn server on the event loop of the process: bound at once, and ended by the process, not by its signals."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn

from nitsum_jax.errors import PreconditionError
from nitsum_jax.server.address import check_bindable
from nitsum_jax.server.security.http_guard import MAX_HEADER_BYTES, App
from nitsum_jax.server.security.tls import TlsFiles

_STOP_S = 2  # what is still open after a drain gets this long


class HttpServer:
    """Serves one ASGI application."""

    def __init__(self, app: App, host: str, port: int, tls: TlsFiles | None = None) -> None:
        """Binds the port.

        Args:
          app: what answers.
          host: address of this machine.
          port: 0 takes a free one.
          tls: None: plain HTTP.

        Raises:
          InvalidInputError: `host` is not an address of this machine.
          PreconditionError: the port is in use or not allowed.
        """
        check_bindable(host, port)
        self.host = host
        self.scheme = "http" if tls is None else "https"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError:
            self._socket.close()
            raise PreconditionError(f"port {port} on {host} is in use: give another one") from None
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            http="h11",  # the one that bounds headers while they come in
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # else a client could choose the address that its limits go by
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_STOP_S,
            **(tls.uvicorn_options() if tls is not None else {}),
        )
        self._server = _Quiet(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answers from now on."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                await self._task
                raise PreconditionError(f"the HTTP server on port {self.port} did not start")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends what is open and frees the port."""
        if self._task is None:
            self._socket.close()
            return
        self._server.should_exit = True
        await self._task


class _Quiet(uvicorn.Server):
    """Leaves the signals to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
