"""The connection between a front door and a cell: one socket for requests, tokens and reports.

Ray says where a cell listens; what comes for every step does not go through Ray, whose streams cost milliseconds of
processor time for each message.  A frame is a length and a pickle.  Whoever connects first says the cell's secret,
which only Ray hands out, so bytes of anybody else are not unpickled.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import operator
import pickle
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from nitsum_jax.cluster.messages import CellEvents, CellGoneError, CellLeavesError
from nitsum_jax.engine.request import Request, TokenDelta
from nitsum_jax.errors import NitsumError, one_line

_LENGTH = struct.Struct(">I")
_SECRET_BYTES = 32
_HELLO_S = 10.0  # within which a connection must be opened and say its secret
_LEAVE_S = 5.0  # front doors hang up within
_values_of = operator.attrgetter(*(field.name for field in dataclasses.fields(TokenDelta)))
_EVENTS, _ANSWER, _LEAVE, _SUBMIT, _CANCEL = range(5)


@dataclasses.dataclass(frozen=True, slots=True)
class CellAddress:
    """Where a cell listens, and what to say there first."""

    host: str
    port: int
    secret: bytes = dataclasses.field(repr=False)


class ServedCell(Protocol):
    """What is behind a port: see `host.CellHost`."""

    # ruff: noqa: D102
    def events(self, door: str) -> AsyncIterator[CellEvents]: ...
    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None: ...
    async def cancel(self, ids: Sequence[str]) -> None: ...


class CellPort:
    """Where front doors reach a cell; on one event loop."""

    def __init__(self, cell: ServedCell, host: str):
        """Listens once `open` is called, on a free port of `host`."""
        self._cell = cell
        self._host = host
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._writers: set[asyncio.StreamWriter] = set()
        self._leaving = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def open(self) -> CellAddress:
        """Listens, if it does not yet; returns where."""
        async with self._opening:
            if self._server is None:
                self._server = await asyncio.start_server(self._serve, self._host, 0)
        return CellAddress(self._host, self._server.sockets[0].getsockname()[1], self._secret)

    async def leave(self) -> None:
        """Tells front doors that the cell goes, and waits until they have hung up; not for ever."""
        self._leaving = True
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            _write(writer, (_LEAVE,))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._idle.wait()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(EOFError, OSError, TimeoutError):  # the front door has ended
                await self._serve_door(reader, writer)
        finally:
            self._writers.discard(writer)
            if not self._writers:
                self._idle.set()
            writer.close()

    async def _serve_door(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(_HELLO_S):
            if not hmac.compare_digest(await reader.readexactly(_SECRET_BYTES), self._secret):
                return
            door = await _read(reader)
        self._writers.add(writer)
        self._idle.clear()
        _keep_alive(writer)
        if self._leaving:
            _write(writer, (_LEAVE,))
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(self._tell(door, writer))
            try:
                while True:
                    kind, *rest = await _read(reader)
                    if kind == _SUBMIT:
                        tasks.create_task(self._submit(door, writer, *rest))
                    else:
                        await self._cell.cancel(*rest)
            except (EOFError, OSError):
                telling.cancel()

    async def _tell(self, door: str, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # whoever reads learns of it, too
            async with contextlib.aclosing(self._cell.events(door)) as told:  # type: ignore[type-var]
                async for events in told:
                    _write(writer, (_EVENTS, pack(events)))
                    await writer.drain()

    async def _submit(
        self, door: str, writer: asyncio.StreamWriter, number: int, request: Request, left_s: float | None
    ) -> None:
        error = await self._cell.submit(door, request, left_s)
        _write(writer, (_ANSWER, number, error))


class CellConnection:
    """A front door's end of it; on one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        """See `connect`."""
        self._reader, self._writer = reader, writer
        self._answers: dict[int, asyncio.Future[NitsumError | None]] = {}
        self._count = 0

    async def events(self) -> AsyncIterator[CellEvents]:
        """What happens there.

        Raises:
          CellLeavesError: it is taken away.
          CellGoneError: its process has ended, or cannot be reached.
        """
        try:
            while True:
                kind, *rest = await _read(self._reader)
                if kind == _EVENTS:
                    yield unpack(*rest)
                elif kind == _ANSWER:
                    number, error = rest
                    answer = self._answers.get(number)
                    if answer is not None and not answer.done():
                        answer.set_result(error)
                else:
                    raise CellLeavesError("it is taken away")
        except (EOFError, OSError) as error:
            raise CellGoneError(f"the connection to it ended: {one_line(str(error), 100)}") from None

    async def submit(self, request: Request, left_s: float | None) -> NitsumError | None:
        """Sends a request; returns why it is not taken. `events` must be read meanwhile."""
        self._count += 1
        answer = self._answers[number := self._count] = asyncio.get_running_loop().create_future()
        try:
            self._say((_SUBMIT, number, request, left_s))
            return await answer
        finally:
            del self._answers[number]

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends requests."""
        self._say((_CANCEL, tuple(ids)))

    def close(self) -> None:
        """Hangs up: the requests end."""
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(CellGoneError("the connection to it ended"))
        self._writer.close()

    def _say(self, frame: tuple[Any, ...]) -> None:
        if self._writer.is_closing():
            raise CellGoneError("the connection to it ended")
        _write(self._writer, frame)


async def connect(address: CellAddress, door: str) -> CellConnection:
    """Reaches a cell.

    Raises:
      CellGoneError: it cannot be reached.
    """
    try:
        async with asyncio.timeout(_HELLO_S):
            reader, writer = await asyncio.open_connection(address.host, address.port)
    except (OSError, TimeoutError) as error:
        why = one_line(str(error), 100) or f"no answer within {_HELLO_S:g} s"
        raise CellGoneError(f"it cannot be reached at {address.host}:{address.port}: {why}") from None
    _keep_alive(writer)
    writer.write(address.secret)
    _write(writer, door)
    return CellConnection(reader, writer)


def pack(events: CellEvents) -> tuple[Any, ...]:
    """As tuples, which pickle an order of magnitude faster than dataclasses do; of every token."""
    return [_values_of(one) for one in events.deltas], events.admitted, events.status


def unpack(packed: tuple[Any, ...]) -> CellEvents:
    """What `pack` was given."""
    deltas, admitted, status = packed
    return CellEvents(tuple(TokenDelta(*one) for one in deltas), admitted, status)


def _write(writer: asyncio.StreamWriter, frame: object) -> None:
    data = pickle.dumps(frame, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(data)) + data)


async def _read(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))  # who sends it has said the secret


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Has the kernel end a connection whose other machine is gone: nothing else would tell."""
    found: socket.socket = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not everywhere
            found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
