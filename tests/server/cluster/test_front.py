"""The front door's engine over fake cells: whatever happens to a cell, every stream comes whole."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from nitsum_jax.cluster.front import ClusterEngine
from nitsum_jax.control.tiers import DEFAULT_TIERS, Tier, TierSet
from nitsum_jax.engine.request import FinishReason, Request
from nitsum_jax.errors import InvalidInputError, OverloadedError, UnavailableError
from nitsum_jax.runtime.control.layout_log import LayoutChoice
from nitsum_jax.runtime.streams.router import StreamRouter
from tests.server.cluster.fake_cells import FakeCell

TIMEOUT_S = 20.0


def counting(request: Request) -> Sequence[int]:
    """An answer in which every token tells its place."""
    return tuple(n % 250 for n in range(request.max_tokens))


class Cluster:
    """An engine over fake cells, and streams through it."""

    def __init__(self, cells: Sequence[FakeCell], **settings: Any) -> None:
        self.router = StreamRouter(asyncio.get_running_loop())
        self.cells = {cell.name: cell for cell in cells}
        self.engine = ClusterEngine(
            "fake",
            DEFAULT_TIERS,
            self.router.sink,
            self.router.admitted,
            **{"silent_s": 0.4, "wait_s": 2.0, "missing_s": 0.1, **settings},
        )
        self.engine.set_cells(self.cells)

    async def say(
        self, name: str, tokens: int = 50, **fields: Any
    ) -> tuple[list[int], FinishReason | None, str | None]:
        """All that comes of a request."""
        request = Request(name, (1, 2, 3), tokens, **fields)
        found: list[int] = []
        with self.router.stream(self.engine, request) as stream:
            while True:
                async with asyncio.timeout(TIMEOUT_S):
                    deltas = await stream.next()
                for delta in deltas:
                    found += delta.token_ids
                    if delta.finish_reason is not None:
                        return found, delta.finish_reason, delta.error

    def at(self) -> dict[str, int]:
        """Requests that each cell works on."""
        return {name: cell.engine.stats().running + cell.engine.stats().waiting for name, cell in self.cells.items()}


@contextlib.asynccontextmanager
async def cluster(count: int, step_s: float = 0.002, settings: Any = None, **options: Any) -> AsyncIterator[Cluster]:
    cells = [FakeCell(f"cell-{n}", counting, step_s=step_s, max_batch=64, **options) for n in range(count)]
    made = Cluster(cells, **(settings or {}))
    try:
        assert await asyncio.to_thread(made.engine.wait_for_cells, count, TIMEOUT_S)
        yield made
    finally:
        await asyncio.to_thread(made.engine.close)
        for cell in cells:
            cell.engine.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


def whole(tokens: int = 50) -> tuple[list[int], FinishReason, None]:
    return [n % 250 for n in range(tokens)], FinishReason.LENGTH, None


def test_requests_are_spread_and_come_whole() -> None:
    async def scenario() -> None:
        async with cluster(3) as made:
            answers = await asyncio.gather(*(made.say(str(n)) for n in range(30)))
            assert answers == [whole()] * 30
            assert all(len(cell.taken) >= 5 for cell in made.cells.values())
            assert made.engine.stats().waiting == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["die", "hang", "taken away"])
def test_streams_of_a_cell_that_goes_go_on_elsewhere(how: str) -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            streams = [asyncio.create_task(made.say(str(n), 300)) for n in range(32)]
            await until(lambda: made.engine.stats().tokens_generated > 32 * 20)
            lost = made.cells["cell-0"]
            assert made.at()["cell-0"] > 5
            if how == "die":
                lost.die()
            elif how == "hang":
                lost.hang()
            else:
                made.engine.set_cells({"cell-1": made.cells["cell-1"]})
            assert await asyncio.gather(*streams) == [whole(300)] * 32
            went_on = [one for one in made.cells["cell-1"].taken if one.generated]
            assert len(went_on) > 5
            assert all(one.generated == tuple(range(len(one.generated))) for one in went_on)
            lost.hang(False)

    asyncio.run(scenario())


def test_a_cell_that_hung_and_comes_back_says_nothing_twice() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            streams = [asyncio.create_task(made.say(str(n), 400)) for n in range(8)]
            await until(lambda: made.engine.stats().tokens_generated > 100)
            made.cells["cell-0"].hang()
            await until(lambda: made.engine.cells()["cell-0"] == "silent")
            made.cells["cell-0"].hang(False)
            await until(lambda: made.engine.cells()["cell-0"] == "serving")
            assert await asyncio.gather(*streams) == [whole(400)] * 8
            await until(lambda: made.at() == {"cell-0": 0, "cell-1": 0})  # what it had was cancelled there

    asyncio.run(scenario())


def test_a_cell_that_was_not_reached_for_a_while_serves_again() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            made.cells["cell-0"].die()
            await until(lambda: made.engine.cells() == {"cell-1": "serving"})
            made.cells["cell-0"].dead = False  # only the network was: nobody lists the cells anew
            await until(lambda: made.engine.cells().get("cell-0") == "serving")
            assert await asyncio.gather(*(made.say(str(n)) for n in range(8))) == [whole()] * 8
            assert made.cells["cell-0"].taken

    asyncio.run(scenario())


def test_a_request_that_ends_cells_is_given_up_after_two() -> None:
    async def scenario() -> None:
        async with cluster(4) as made:

            def poisoned() -> FakeCell | None:
                return next((c for c in made.cells.values() if not c.dead and c.engine.stats().running), None)

            async def kill() -> None:
                for _ in range(2):
                    await until(lambda: poisoned() is not None)
                    cell = poisoned()
                    assert cell is not None
                    cell.die()

            killing = asyncio.create_task(kill())
            _, finish, error = await made.say("poison", 5000)
            await killing
            assert finish is FinishReason.ERROR
            assert error == "2 cells ended while they worked on this request: it is not tried again"
            assert sum(cell.dead for cell in made.cells.values()) == 2
            assert await made.say("fine") == whole()

    asyncio.run(scenario())


def test_a_request_may_outlive_more_cells_that_are_taken_away() -> None:
    async def scenario() -> None:
        async with cluster(4) as made:
            stream = asyncio.create_task(made.say("long", 400))
            for left in range(3):
                await until(lambda: any(cell.engine.stats().running for cell in made.cells.values() if not cell.dead))
                next(c for c in made.cells.values() if not c.dead and c.engine.stats().running).leave()
                await until(lambda left=left: len(made.engine.cells()) == 3 - left)  # type: ignore[misc]
            assert await stream == whole(400)

    asyncio.run(scenario())


def test_a_request_waits_for_a_cell_and_not_for_ever() -> None:
    async def scenario() -> None:
        async with cluster(1, settings={"wait_s": 0.5}) as made:
            stream = asyncio.create_task(made.say("waits", 200))
            await until(lambda: made.engine.stats().tokens_generated > 10)
            made.cells["cell-0"].die()
            spare = FakeCell("spare", counting, step_s=0.002)
            await until(lambda: not made.engine.cells())
            with pytest.raises(UnavailableError, match="no cell is up"):
                made.engine.submit(Request("refused", (1,), 5))
            made.engine.set_cells({"spare": spare})
            assert await stream == whole(200)
            again = asyncio.create_task(made.say("never", 3000))
            await until(lambda: spare.engine.stats().running > 0)
            spare.die()
            _, finish, error = await again
            assert finish is FinishReason.ERROR
            assert error is not None
            assert "no cell could go on" in error
            spare.engine.close()

    asyncio.run(scenario())


def test_cells_come_and_go_under_load() -> None:
    async def scenario() -> None:
        async with cluster(3) as made:
            streams = [asyncio.create_task(made.say(str(n), 400)) for n in range(24)]
            for names in (("cell-0",), ("cell-0", "cell-1", "cell-2"), ("cell-2",)):
                await asyncio.sleep(0.15)
                made.engine.set_cells({name: made.cells[name] for name in names})
            assert await asyncio.gather(*streams) == [whole(400)] * 24
            await until(lambda: made.engine.cells() == {"cell-2": "serving"})

    asyncio.run(scenario())


def test_a_cell_that_is_left_out_for_a_moment_is_not_taken_away() -> None:
    async def scenario() -> None:
        async with cluster(1, settings={"missing_s": 1.0}) as made:
            stream = asyncio.create_task(made.say("long", 300))
            await until(lambda: made.engine.stats().tokens_generated > 20)
            made.engine.set_cells({})
            await asyncio.sleep(0.1)
            assert await made.say("meanwhile") == whole()
            made.engine.set_cells(made.cells)
            assert await stream == whole(300)
            assert [one.generated for one in made.cells["cell-0"].taken] == [(), ()]

    asyncio.run(scenario())


def test_a_cell_that_is_listed_no_more_and_ends_is_forgotten() -> None:
    async def scenario() -> None:
        async with cluster(2, settings={"missing_s": 5.0}) as made:
            made.engine.set_cells({"cell-1": made.cells["cell-1"]})
            made.cells["cell-0"].leave()
            await until(lambda: made.engine.cells() == {"cell-1": "serving"})
            await asyncio.sleep(0.6)  # longer than a cell that is listed is left alone
            assert made.engine.cells() == {"cell-1": "serving"}
            assert await made.say("fine") == whole()

    asyncio.run(scenario())


def test_what_a_client_leaves_ends_in_its_cell() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            streams = [asyncio.create_task(made.say(str(n), 5000)) for n in range(6)]
            await until(lambda: sum(made.at().values()) == 6)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            await until(lambda: sum(made.at().values()) == 0)

    asyncio.run(scenario())


def test_wrong_requests_are_refused_as_by_an_engine() -> None:
    async def scenario() -> None:
        async with cluster(1) as made:
            for request, error in (
                (Request("r", (), 5), InvalidInputError),
                (Request("r", (300,), 5), InvalidInputError),
                (Request("r", (1,), 5, tier="none"), InvalidInputError),
                (Request("r", (1,) * 20_000, 5), InvalidInputError),
            ):
                with pytest.raises(error):
                    made.engine.submit(request)
            assert await made.say("fine") == whole()

    asyncio.run(scenario())


def test_a_full_cluster_refuses_more() -> None:
    async def scenario() -> None:
        async with cluster(2, max_queue=3) as made:
            for cell in made.cells.values():
                cell.engine.hold()

            async def fill() -> None:
                for n in range(40):
                    made.engine.submit(Request(str(n), (1,), 5))
                    await asyncio.sleep(0.01)

            with pytest.raises(OverloadedError, match="requests wait already"):
                await fill()
            for cell in made.cells.values():
                cell.engine.release()

    asyncio.run(scenario())


def test_deadlines_travel_as_the_time_that_is_left() -> None:
    async def scenario() -> None:
        async with cluster(1) as made:
            _, finish, _ = await made.say("late", 5000, deadline_s=time.monotonic() + 0.3)
            assert finish is FinishReason.DEADLINE

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"version": "0.0.1"}, "has version 0.0.1 and the front door"),
        ({"tiers": TierSet((Tier("own", 1.0, 1.0),))}, "has other tiers"),
    ],
)
def test_a_cell_that_differs_gets_nothing(other: Any, says: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with cluster(1) as made:
            odd = FakeCell("odd", counting, **other)
            made.engine.set_cells({**made.cells, "odd": odd})
            await until(lambda: says in caplog.text)
            assert await asyncio.gather(*(made.say(str(n)) for n in range(6))) == [whole()] * 6
            assert odd.taken == []
            odd.engine.close()

    asyncio.run(scenario())


def test_cells_are_seen_as_one() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            engine = made.engine
            assert str(engine.layout().unplaced) == "tp1x4"
            assert len(engine.device_names) == 4
            assert [instance.devices for instance in engine.layout().instances] == [(0,), (1,), (2,), (3,)]
            assert engine.allowed_layouts() == ("tp1x2", "tp2")
            report = await asyncio.wrap_future(engine.set_layout("tp2x2"))
            assert report.to_layout
            engine.lose_device(3)
            assert made.cells["cell-1"].engine.lost_devices() == (1,)
            with pytest.raises(InvalidInputError, match="there is no device 4"):
                engine.lose_device(4)
            assert [one.tier for one in engine.forecasts()] == list(DEFAULT_TIERS.names)
            tokens = engine.stats().tokens_generated
            await made.say("counted")
            await until(lambda: engine.stats().tokens_generated == tokens + 50)
            made.cells["cell-0"].die()
            await until(lambda: len(engine.cells()) == 1)
            assert engine.stats().tokens_generated == tokens + 50  # a counter never falls

    asyncio.run(scenario())


def test_each_cell_is_seen_by_itself() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            cell = made.cells["cell-1"]
            cell.decisions = (LayoutChoice(1.0, "tp2", "why not"),)
            cell.lately = {"standard": (4, 3)}
            await until(lambda: made.engine.cell_views()[1].lately == {"standard": (4, 3)})
            views = made.engine.cell_views()
            assert [(view.name, view.state, view.layout) for view in views] == [
                ("cell-0", "serving", "tp1x2"),
                ("cell-1", "serving", "tp1x2"),
            ]
            assert [view.devices for view in views] == [(0, 1), (2, 3)]
            assert made.engine.cell_notes() == ([LayoutChoice(1.0, "tp2", "why not", cell="cell-1")], [])
            made.cells["cell-0"].hang()
            await until(lambda: made.engine.cell_views()[0].state == "silent")
            assert [view.devices for view in made.engine.cell_views()] == [(), (0, 1)]  # as in the layout of all
            made.cells["cell-0"].hang(False)

    asyncio.run(scenario())


def test_counters_do_not_fall_while_a_cell_is_silent() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            await asyncio.gather(*(made.say(str(n)) for n in range(8)))
            await until(lambda: made.engine.stats().tokens_generated == 8 * 50)
            made.cells["cell-0"].hang()
            await until(lambda: made.engine.cells()["cell-0"] == "silent")
            stats = made.engine.stats()
            assert stats.tokens_generated == 8 * 50
            assert stats.queue_capacity == 64  # gauges are of the cells that serve
            made.cells["cell-0"].hang(False)

    asyncio.run(scenario())


def test_a_request_that_no_cell_takes_is_given_up() -> None:
    async def scenario() -> None:
        async with cluster(2, settings={"wait_s": 0.5}) as made:
            for cell in made.cells.values():
                cell.full = True
            _, finish, error = await made.say("nowhere")
            assert finish is FinishReason.ERROR
            assert error == "no cell could go on with this request within 0.5 s: try again"

    asyncio.run(scenario())


class _SlowToRead(dict[str, Any]):
    """One that is read so slowly that others come between."""

    def values(self) -> Any:
        for value in super().values():
            time.sleep(0.001)
            yield value


def test_requests_may_come_while_a_cell_goes() -> None:
    """Front ends submit on their own thread, which adds to what the loop reads to move the streams of a cell."""

    async def scenario() -> None:
        async with cluster(2) as made:
            made.engine._live = _SlowToRead()
            streams = [asyncio.create_task(made.say(str(n), 300)) for n in range(32)]
            await until(lambda: made.at()["cell-0"] > 5)
            made.cells["cell-0"].die()
            for n in range(32, 64):
                streams.append(asyncio.create_task(made.say(str(n), 300)))
                await asyncio.sleep(0.002)
            assert await asyncio.gather(*streams) == [whole(300)] * 64

    asyncio.run(scenario())


def test_what_is_asked_of_a_cell_that_has_ended_is_unavailable() -> None:
    async def scenario() -> None:
        async with cluster(1) as made:
            made.cells["cell-0"].dead = True  # no message tells of it yet
            with pytest.raises(UnavailableError, match="the process was killed"):
                await asyncio.wrap_future(made.engine.set_layout("tp1x2"))
            with pytest.raises(UnavailableError, match="the process was killed"):
                made.engine.lose_device(0)

    asyncio.run(scenario())


def test_draining_waits_for_streams_and_takes_no_more() -> None:
    async def scenario() -> None:
        async with cluster(2) as made:
            stream = asyncio.create_task(made.say("last", 200))
            await until(lambda: sum(made.at().values()) == 1)
            draining = asyncio.create_task(asyncio.to_thread(made.engine.drain, 10.0))
            await asyncio.sleep(0.02)
            with pytest.raises(UnavailableError, match="stopping"):
                made.engine.submit(Request("more", (1,), 5))
            assert await draining
            assert await stream == whole(200)

    asyncio.run(scenario())
