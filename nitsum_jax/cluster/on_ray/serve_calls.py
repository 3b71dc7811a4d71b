"""A front door's calls to a cell: what is seldom as calls of a Ray Serve handle, what is frequent over a socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nitsum_jax.cluster.messages import CellEvents, CellFacts, CellGoneError
from nitsum_jax.cluster.wire import CellConnection, connect
from nitsum_jax.engine.request import Request
from nitsum_jax.errors import NitsumError, one_line

if TYPE_CHECKING:
    from nitsum_jax.engine.switching.switch import SwitchReport

_LISTEN_S = 30.0


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """What Ray says about a replica that is no more, as the front door understands it."""
    try:
        yield
    except TimeoutError:
        raise CellGoneError("it does not answer") from None
    except (RayError, RayServeException) as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, NitsumError):
            raise cause from None
        raise CellGoneError(one_line(str(error), 160) or type(error).__name__) from None


class ServeCell:
    """The cell of one replica; see `messages.CellCalls`."""

    # ruff: noqa: D102
    def __init__(self, name: str, handle: "DeploymentHandle[Any]") -> None:
        self._name = name
        self._handle = handle
        self._connection: CellConnection | None = None

    async def facts(self) -> CellFacts:
        with _reached():
            return await self._handle.facts.remote(self._name)

    async def events(self, door: str) -> AsyncIterator[CellEvents]:
        with _reached():
            async with asyncio.timeout(_LISTEN_S):
                address = await self._handle.listen.remote(self._name)
        connection = self._connection = await connect(address, door)
        try:
            async for events in connection.events():
                yield events
        finally:
            connection.close()

    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None:
        return await self._connected().submit(request, left_s)

    async def cancel(self, ids: Sequence[str]) -> None:
        self._connected().cancel(ids)

    async def set_layout(self, layout: str, prepare: bool) -> "SwitchReport":
        with _reached():
            return await self._handle.set_layout.remote(self._name, layout, prepare)

    async def set_device(self, device: int, lost: bool) -> None:
        with _reached():
            await self._handle.set_device.remote(self._name, device, lost)

    def _connected(self) -> CellConnection:
        if self._connection is None:
            raise CellGoneError("there is no connection to it")
        return self._connection
