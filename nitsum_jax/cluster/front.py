"""The engine that a front door serves: it looks like one, and its requests run in cells.

All state belongs to one event loop on a thread of its own.  A request goes to the cell that the router chooses.  When
that cell ends, hangs or is taken away, the request goes on elsewhere from the tokens that came: nobody sees more than
a pause.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from nitsum_jax.cluster.link import CellLink, LinkState
from nitsum_jax.cluster.messages import CellCalls, CellEvents, CellGoneError
from nitsum_jax.cluster.streams import LiveStream, origin
from nitsum_jax.cluster.summary import ClusterView
from nitsum_jax.control.routing.cells import RoutedRequest
from nitsum_jax.control.routing.routers import CellRouter, PredictedRouter
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.kv.prefix_index import extend_keys
from nitsum_jax.engine.request import FinishReason, Request, TokenDelta, check_request
from nitsum_jax.errors import InvalidInputError, NitsumError, OverloadedError, UnavailableError, one_line

_LOG = logging.getLogger(__name__)
_USUAL_OUTPUT = 128.0
_CALL_S = 10.0  # a cell that lives answers a call within
_MOST_PAUSE_S = 60.0
T = TypeVar("T")


class _Lost(NamedTuple):
    """A cell that is gone, though it is still listed."""

    retry_s: float  # when it is tried again
    pause_s: float  # twice as long after each failure


class ClusterEngine(ClusterView):
    """See the module; `runtime.backend.ServingEngine` describes the interface."""

    # ruff: noqa: D102
    def __init__(
        self,
        model: str,
        tiers: TierSet,
        sink: Callable[[Sequence[TokenDelta]], None],
        admitted: Callable[[str, float], None],
        *,
        any_targets: bool = False,
        time_scale: float = 1.0,
        router: CellRouter | None = None,
        silent_s: float = 5.0,
        wait_s: float = 30.0,
        join_s: float = 60.0,
        missing_s: float = 2.0,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        """Has no cells yet; see `set_cells`.

        Args:
          model: that every cell must serve.
          tiers: that every cell must have.
          sink: takes deltas, on this engine's thread.
          admitted: called with every request that an instance takes, and when.
          any_targets: cells may have found targets of their own (--tiers=auto).
          time_scale: of paced cells, seconds of their reports for one of the tiers' targets.
          router: chooses cells.
          silent_s: a cell that says nothing for so long is left.
          wait_s: how long a request waits for a cell when there is none.
          join_s: most seconds until a new cell tells its facts.
          missing_s: a cell that is not listed for so long is taken away.
          on_close: called at the end.
        """
        super().__init__(tiers)
        self._model = model
        self._expected = (model, None if any_targets else tiers)
        self._sink = sink
        self._told_admitted = admitted
        self._time_scale = time_scale
        self._router = router or PredictedRouter()
        self._silent_s, self._wait_s, self._join_s = silent_s, wait_s, join_s
        self._missing_s = missing_s
        self._on_close = on_close
        self._door = uuid.uuid4().hex[:12]
        self._wanted: dict[str, CellCalls] = {}
        self._lost: dict[str, _Lost] = {}
        self._missing: dict[str, float] = {}  # links to cells that are listed no more, and since when
        self._live: dict[str, LiveStream] = {}
        self._homeless: dict[str, LiveStream] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._accepting = True
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="nitsum-cluster", daemon=True)
        self._thread.start()
        self._post(lambda: self._start(self._watch()))

    # ---- for the front ends

    def submit(self, request: Request) -> None:
        if not self._accepting:
            raise UnavailableError("the server is stopping and takes no new requests: try another one")
        serving = self._serving()
        if not serving:
            raise UnavailableError("no cell is up: try again when one has started")
        status = serving[0].status
        assert status is not None
        check_request(request, status.limits)
        if self._waiting() >= self.stats().queue_capacity:
            raise OverloadedError(
                f"{self._waiting()} requests wait already: try again later, add cells, or raise --max_queue"
            )
        with self._changed:
            if request.id in self._live:
                raise InvalidInputError(f"a request with id {request.id} is alive: choose another id")
            stream = self._live[request.id] = LiveStream(request)
        self._post(lambda: self._place(stream))

    def cancel(self, request_id: str) -> None:
        self._post(lambda: self._cancel(request_id))

    def set_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        return self._everywhere(lambda link: link.calls.set_layout(str(layout), False))

    def prepare_layout(self, layout: str) -> "concurrent.futures.Future[Any]":
        return self._everywhere(lambda link: link.calls.set_layout(str(layout), True))

    def lose_device(self, device: int) -> None:
        self._set_device(device, True)

    def restore_device(self, device: int) -> None:
        self._set_device(device, False)

    def ask(self, call: Callable[[], T]) -> "concurrent.futures.Future[T]":
        async def answer() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(answer(), self._loop)

    def drain(self, timeout_s: float) -> bool:
        self._accepting = False
        with self._changed:
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def close(self) -> None:
        self._accepting = False
        if not self._thread.is_alive():
            return
        with contextlib.suppress(TimeoutError, concurrent.futures.CancelledError):
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_CALL_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CALL_S)
        if not self._thread.is_alive():
            self._loop.close()
        if self._on_close is not None:
            self._on_close()

    # ---- for whoever knows which cells there are

    def set_cells(self, cells: Mapping[str, CellCalls]) -> None:
        """Says which cells there are now, on any thread: new ones are joined, those that stay away are drained."""
        found = dict(cells)
        self._post(lambda: self._set_cells(found))

    def wait_for_cells(self, count: int, timeout_s: float) -> bool:
        """Waits until so many serve; returns whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._serving()) >= count, timeout_s)

    # ---- cells, on the loop

    def _set_cells(self, cells: Mapping[str, CellCalls]) -> None:
        self._wanted = dict(cells)
        self._lost = {name: lost for name, lost in self._lost.items() if name in cells}
        now = time.monotonic()
        self._missing = {name: self._missing.get(name, now) for name in self._links if name not in cells}
        for name in cells:
            if name not in self._links and name not in self._lost:
                self._join(name)

    def _leave_missing(self) -> None:
        """Leaves cells that are listed no more: not at once, as Ray leaves some out while it changes their settings.

        One that is really taken away says so itself.
        """
        now = time.monotonic()
        for name, since_s in list(self._missing.items()):
            if now - since_s > self._missing_s:
                del self._missing[name]
                if (link := self._links.get(name)) is not None:
                    _LOG.info("cell %s is taken away: its streams go on elsewhere", name)
                    self._leave(link, LinkState.GONE, crashed=False)

    def _join(self, name: str) -> None:
        link = CellLink(name, self._wanted[name], on_events=self._take, on_gone=self._gone)
        self._links[name] = link
        link.task = self._start(link.run(self._door, lambda: self._expected, self._join_s))

    def _join_lost(self) -> None:
        """Tries cells again that are still listed: perhaps only the network was away."""
        now = time.monotonic()
        for name, lost in self._lost.items():
            if name not in self._links and now >= lost.retry_s:
                self._join(name)

    def _gone(self, link: CellLink, why: str, left: bool) -> None:
        if self._links.get(link.name) is link:
            left = left or link.name not in self._wanted
            _LOG.log(logging.INFO if left else logging.WARNING, "cell %s is gone (%s)", link.name, why)
            before = self._lost.get(link.name)
            served = link.status is not None
            pause_s = self._silent_s if before is None or served else min(2 * before.pause_s, _MOST_PAUSE_S)
            if link.name in self._wanted:
                self._lost[link.name] = _Lost(time.monotonic() + pause_s, pause_s)
            self._leave(link, LinkState.GONE, crashed=not left)

    def _leave(self, link: CellLink, state: LinkState, *, crashed: bool) -> None:
        """A cell gets nothing any more; what it had goes on elsewhere."""
        link.state = state
        if state is LinkState.GONE:
            self._keep_counters(link)
            self._links.pop(link.name, None)
            if link.task is not None:
                link.task.cancel()
        with self._changed:  # front ends add to it
            moved = [stream for stream in self._live.values() if stream.cell == link.name]
        for stream in moved:
            stream.cell = None
            stream.lost += crashed
            link.known.ended()
            if state is LinkState.SILENT:  # one that is gone ends them itself, if it still can
                self._call(link, link.calls.cancel([stream.attempt_id]))
            if stream.poisonous:
                self._fail(
                    stream, f"{stream.lost} cells ended while they worked on this request: it is not tried again"
                )
            else:
                self._place(stream)
        self._notify()

    async def _watch(self) -> None:
        """Leaves cells that are silent, and gives up requests that find none."""
        while True:
            await asyncio.sleep(min(0.2, self._silent_s / 4, self._missing_s / 4))
            for link in list(self._links.values()):
                if link.state is LinkState.SERVING and link.silent_s() > self._silent_s:
                    _LOG.warning(
                        "cell %s says nothing for %.1f s: its streams go on elsewhere", link.name, self._silent_s
                    )
                    self._leave(link, LinkState.SILENT, crashed=True)
            self._leave_missing()
            self._join_lost()
            self._place_homeless()

    # ---- requests, on the loop

    def _place(self, stream: LiveStream) -> None:
        """Sends a request to a cell, or has it wait for one."""
        if self._live.get(stream.request.id) is not stream:
            return
        now = time.monotonic()
        if stream.looking_s is None:
            stream.looking_s = now
        elif now - stream.looking_s > self._wait_s:
            self._fail(stream, f"no cell could go on with this request within {self._wait_s:g} s: try again")
            return
        links = {link.name: link for link in self._serving() if link.name not in stream.refused}
        if not links:
            self._homeless[stream.request.id] = stream
            return
        self._homeless.pop(stream.request.id, None)
        routed = self._routed(stream)
        chosen = self._router.choose(routed, [link.known for link in links.values()], now)
        chosen.sent(routed, now)
        link = links[chosen.name]
        sent = stream.sent(link.name)
        self._start(self._submit(link, stream, sent))

    async def _submit(self, link: CellLink, stream: LiveStream, sent: Request) -> None:
        deadline_s = stream.request.deadline_s
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(_CALL_S):
                error = await link.calls.submit(self._door, sent, left_s)
        except (CellGoneError, TimeoutError) as problem:
            if self._is_at(stream, link, sent.id):
                _LOG.warning("cell %s did not take a request: %s", link.name, one_line(str(problem), 120))
                self._again(link, stream)
            return
        if not self._is_at(stream, link, sent.id):
            return
        if error is None:
            stream.looking_s = None
        elif isinstance(error, OverloadedError | UnavailableError):
            self._again(link, stream)
        else:
            link.known.ended()
            self._fail(stream, str(error))

    def _again(self, link: CellLink, stream: LiveStream) -> None:
        """A cell did not take it: another may."""
        link.known.ended()
        stream.cell = None
        stream.refused.add(link.name)
        if all(other.name in stream.refused for other in self._serving()):
            stream.refused.clear()
            self._homeless[stream.request.id] = stream
            return
        self._place(stream)

    def _place_homeless(self) -> None:
        for stream in list(self._homeless.values()):
            self._place(stream)

    def _is_at(self, stream: LiveStream, link: CellLink, attempt_id: str) -> bool:
        mine = self._live.get(stream.request.id) is stream
        return mine and stream.cell == link.name and stream.attempt_id == attempt_id

    def _take(self, link: CellLink, events: CellEvents) -> None:
        """A cell says something."""
        if self._links.get(link.name) is not link:
            return
        now = time.monotonic()
        for attempt_id in events.admitted:
            stream = self._live.get(origin(attempt_id))
            if stream is not None and self._is_at(stream, link, attempt_id):
                stream.refused.clear()
                if not stream.admitted:  # going on elsewhere is no second time in the queue
                    stream.admitted = True
                    self._told_admitted(stream.request.id, now)
        passed = []
        for delta in events.deltas:
            stream = self._live.get(origin(delta.request_id))
            if stream is None or not self._is_at(stream, link, delta.request_id):
                continue
            passed.append(stream.take(delta, now))
            if delta.finish_reason is not None:
                self._forget(stream, link)
        if passed:
            self._sink(passed)
        if events.status is not None:
            self._notify()
            self._place_homeless()

    def _cancel(self, request_id: str) -> None:
        stream = self._live.get(request_id)
        if stream is None:
            return
        link = None if stream.cell is None else self._links.get(stream.cell)
        if link is not None:
            self._call(link, link.calls.cancel([stream.attempt_id]))
        self._forget(stream, link)
        self._sink([TokenDelta(request_id, (), time.monotonic(), FinishReason.CANCELLED)])

    def _fail(self, stream: LiveStream, why: str) -> None:
        self._forget(stream, None)
        self._sink([TokenDelta(stream.request.id, (), time.monotonic(), FinishReason.ERROR, why)])

    def _forget(self, stream: LiveStream, link: CellLink | None) -> None:
        if link is not None:
            link.known.ended()
        self._homeless.pop(stream.request.id, None)
        with self._changed:
            del self._live[stream.request.id]
            self._changed.notify_all()

    def _routed(self, stream: LiveStream) -> RoutedRequest:
        request = stream.request
        tier = self._tiers.get(request.tier).with_targets(request.ttft_ms, request.tpot_ms).scaled(self._time_scale)
        tokens = (*request.prompt_ids, *stream.generated)
        prefixes: tuple[tuple[int, bytes], ...] = ()
        serving = self._serving()
        facts = serving[0].facts if serving else None
        report = serving[0].known.report if serving else None
        if facts is not None and facts.granule is not None and report is not None and report.prefixes:
            size = report.page_size
            keys: list[bytes] = []
            extend_keys(keys, tokens, size)
            prefixes = tuple((size * (n + 1), key) for n, key in enumerate(keys) if size * (n + 1) % facts.granule == 0)
        output = min(_USUAL_OUTPUT, request.max_tokens - len(stream.generated))
        return RoutedRequest(tier, len(tokens), output, prefixes)

    # ---- the loop

    def _everywhere(self, change: Callable[[CellLink], Coroutine[Any, Any, T]]) -> "concurrent.futures.Future[T]":
        """Has every cell do it; the answer is the first one's, or the error of any."""
        links = self._serving()
        if not links:
            raise UnavailableError("no cell is up: try again when one has started")

        async def all_of_them() -> T:
            return (await asyncio.gather(*(change(link) for link in links)))[0]

        return asyncio.run_coroutine_threadsafe(all_of_them(), self._loop)

    def _set_device(self, device: int, lost: bool) -> None:
        link, index = self._owner(device)
        try:
            asyncio.run_coroutine_threadsafe(link.calls.set_device(index, lost), self._loop).result(_CALL_S)
        except TimeoutError:
            raise UnavailableError(f"cell {link.name} does not answer: try again when it does, or has gone") from None

    def _call(self, link: CellLink, call: Coroutine[Any, Any, None]) -> None:
        """Asks a cell for something that may as well not happen."""

        async def bounded() -> None:
            with contextlib.suppress(TimeoutError, NitsumError):
                async with asyncio.timeout(_CALL_S):
                    await call

        self._start(bounded())

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("a task of the front door failed", exc_info=error)

    def _post(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed: nothing is left to be done
            self._loop.call_soon_threadsafe(call)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    async def _end(self) -> None:
        for stream in list(self._live.values()):
            self._cancel(stream.request.id)
        await asyncio.sleep(0)
        for link in self._links.values():
            link.state = LinkState.GONE  # not worth a word: they are left on purpose
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
