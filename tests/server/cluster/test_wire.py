"""The socket between a front door and a cell: what one says the other hears, and what happens when one goes."""

import asyncio
import contextlib
import dataclasses
import pickle
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from nitsum_jax.cluster import wire
from nitsum_jax.cluster.messages import CellEvents, CellGoneError, CellLeavesError
from nitsum_jax.cluster.wire import CellConnection, CellPort, connect
from nitsum_jax.engine.request import FinishReason, Request, TokenDelta, TokenLogprob
from nitsum_jax.errors import NitsumError, OverloadedError

HOST = "127.0.0.1"
DELTAS = (
    TokenDelta("a#1", (1, 2, 3), 4.5),
    TokenDelta("b#2", (), 4.5, FinishReason.ERROR, "why", cached_tokens=7),
    TokenDelta("c#3", (9,), 4.5, logprobs=(TokenLogprob(-0.5, ((9, -0.5),)),)),
)


class Cell:
    """Says what a test puts into its queue."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[CellEvents] = asyncio.Queue()
        self.taken: list[tuple[str, Request, float | None]] = []
        self.cancelled: list[str] = []
        self.reading: set[str] = set()
        self.answers = asyncio.Event()

    async def events(self, door: str) -> AsyncIterator[CellEvents]:
        self.reading.add(door)
        try:
            while True:
                yield await self.said.get()
        finally:
            self.reading.discard(door)

    async def submit(self, door: str, request: Request, left_s: float | None) -> NitsumError | None:
        if request.id == "never":
            await self.answers.wait()
        self.taken.append((door, request, left_s))
        return OverloadedError("the queue is full") if request.id == "full" else None

    async def cancel(self, ids: Sequence[str]) -> None:
        self.cancelled += ids


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Cell, CellPort, CellConnection]]:
    cell = Cell()
    port = CellPort(cell, HOST)
    async with asyncio.timeout(20):
        connection = await connect(await port.open(), "door")
        try:
            yield cell, port, connection
        finally:
            connection.close()
            await port.leave()


def test_what_is_said_is_heard() -> None:
    async def scenario() -> None:
        async with connected() as (cell, _, connection):
            heard: list[CellEvents] = []

            async def hear() -> None:
                async for events in connection.events():
                    heard.append(events)

            hearing = asyncio.create_task(hear())
            request = Request("r#1", (1, 2, 3), 50, generated=(4, 5))
            assert await connection.submit(request, 1.5) is None
            assert str(await connection.submit(Request("full", (1,), 5), None)) == "the queue is full"
            assert cell.taken[0] == ("door", request, 1.5)
            connection.cancel(["r#1", "other"])
            said = [CellEvents(deltas=DELTAS), CellEvents(admitted=("r#1",)), CellEvents(DELTAS[:1] * 20_000)]
            for events in said:
                cell.said.put_nowait(events)
            while len(heard) < len(said):
                await asyncio.sleep(0.001)
            assert heard == said
            assert cell.cancelled == ["r#1", "other"]
            hearing.cancel()

    asyncio.run(scenario())


def test_a_front_door_that_hangs_up_is_no_longer_told() -> None:
    async def scenario() -> None:
        async with connected() as (cell, _, connection):
            while cell.reading != {"door"}:
                await asyncio.sleep(0.001)
            connection.close()
            while cell.reading:
                await asyncio.sleep(0.001)

    asyncio.run(scenario())


def test_a_cell_that_is_taken_away_says_so() -> None:
    async def scenario() -> None:
        async with connected() as (cell, port, connection):
            while not cell.reading:
                await asyncio.sleep(0.001)
            leaving = asyncio.create_task(port.leave())
            with pytest.raises(CellLeavesError):
                await anext(connection.events())
            assert not leaving.done()  # its requests go on elsewhere first
            connection.close()
            await leaving

    asyncio.run(scenario())


def test_a_cell_that_ends_is_gone_for_whoever_waits() -> None:
    async def scenario() -> None:
        async with connected() as (cell, port, connection):
            waiting = asyncio.create_task(connection.submit(Request("never", (1,), 5), None))
            while not cell.reading:
                await asyncio.sleep(0.001)
            for writer in list(port._writers):
                writer.transport.abort()  # as the kernel does with the sockets of a process that was killed
            with pytest.raises(CellGoneError) as gone:
                await anext(connection.events())
            assert not isinstance(gone.value, CellLeavesError)
            connection.close()
            with pytest.raises(CellGoneError):
                await waiting
            with pytest.raises(CellGoneError):
                connection.cancel(["never"])
            cell.answers.set()

    asyncio.run(scenario())


def test_nobody_is_heard_without_the_secret() -> None:
    async def scenario() -> None:
        async with connected() as (cell, port, _):
            address = await port.open()
            stranger = await connect(dataclasses.replace(address, secret=b"?" * 32), "stranger")
            with pytest.raises(CellGoneError):
                await anext(stranger.events())
            stranger.close()
            assert "stranger" not in cell.reading
            assert address.secret.hex() not in repr(address)

    asyncio.run(scenario())


def test_a_cell_that_is_not_there_is_named() -> None:
    async def scenario() -> None:
        cell = CellPort(Cell(), HOST)
        address = await cell.open()
        await cell.leave()
        with pytest.raises(CellGoneError, match=f"cannot be reached at {HOST}:{address.port}"):
            await connect(address, "door")

    asyncio.run(scenario())


def test_packed_events_are_the_same_events() -> None:
    events = CellEvents(DELTAS, ("x",))
    assert wire.unpack(pickle.loads(pickle.dumps(wire.pack(events)))) == events


def test_embeddings_travel_too() -> None:
    vector = np.arange(4, dtype=np.float32)
    packed = wire.pack(CellEvents((TokenDelta("e", (), 1.0, FinishReason.STOP, embedding=vector),)))
    (delta,) = wire.unpack(pickle.loads(pickle.dumps(packed))).deltas
    assert delta.embedding is not None
    assert delta.embedding.tobytes() == vector.tobytes()
