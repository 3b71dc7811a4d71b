"""The paced server of the demonstration: a child process."""

import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence

from nitsum_jax.errors import UnavailableError
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

_LEAVE_S = 20.0
_QUIET_S, _LOOK_S = 8.0, 0.5


def free_port() -> int:
    """A port that is free just now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.asynccontextmanager
async def child(
    flags: Sequence[str], log: pathlib.Path, ready_s: float, module: str = "nitsum_jax.server.launch.main"
) -> AsyncIterator[str]:
    """Runs a server on a free port until the block ends; yields its address.

    Args:
      flags: of the server.
      log: gets what it says.
      ready_s: most seconds until it is ready.
      module: of its tool; that of nitsum-serve by default.

    Raises:
      UnavailableError: it is not ready in time, or ended; its last words are in the log.
    """
    port = free_port()
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with log.open("w", encoding="utf-8") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            f"--port={port}",
            *flags,
            stdout=file,
            stderr=file,
            env=environment,
        )
    try:
        await _ready(process, log, ready_s)
        yield f"127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(_LEAVE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _ready(process: asyncio.subprocess.Process, log: pathlib.Path, ready_s: float) -> None:
    for _ in range(int(ready_s / 0.25)):
        text = log.read_text(encoding="utf-8")
        if " is ready on " in text:
            return
        if process.returncode is not None:
            last = text.strip().splitlines()[-1:] or ["it said nothing"]
            raise UnavailableError(f"the server ended: {last[0]}")
        await asyncio.sleep(0.25)
    raise UnavailableError(f"the server was not ready within {ready_s:g} s; see {log}")


async def settled(stub: nitsum_pb2_grpc.GenerationServiceStub) -> None:
    """Waits until the server compiles no more: compiling takes the processor from the pace."""
    compiles, since = -1, time.monotonic()
    while time.monotonic() - since < _QUIET_S:
        now = (await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.compiles
        if now != compiles:
            compiles, since = now, time.monotonic()
        await asyncio.sleep(_LOOK_S)
