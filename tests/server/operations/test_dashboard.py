"""The dashboard: its feed, its page, and the page in a real browser."""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nitsum_jax.errors import OverloadedError
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.dashboard import feed as feeds
from nitsum_jax.server.operations.dashboard.feed import Feed
from nitsum_jax.server.operations.dashboard.snapshot import DashboardSnapshot
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import ask, says, until
from tests.server.operations.chromium import CHROMIUM, needs_chromium
from tests.server.operations.http import fetch
from tests.server.operations.ports import Open, opened
from tools.browser import Browser
from tools.sample_cell import sample

PAGE = Path(feeds.__file__).parent / "page.html"


class Film:
    """A source that plays the sample, and then shows its last picture."""

    def __init__(self) -> None:
        self.frames: list[DashboardSnapshot] = list(sample(1_700_000_000.0))[:40]
        self.fail = False

    def snapshot(self) -> DashboardSnapshot:
        if self.fail:
            raise ZeroDivisionError
        return self.frames.pop(0) if len(self.frames) > 1 else self.frames[0]


def parsed(event: str) -> tuple[str, Any]:
    fields = dict(line.split(": ", 1) for line in event.strip().split("\n"))
    return fields["event"], json.loads(fields["data"])


def test_who_comes_late_gets_the_history_and_who_is_slow_the_newest() -> None:
    async def scenario() -> None:
        film = Film()
        feed = Feed(film)
        for _ in range(10):
            await feed.look()
        async with contextlib.aclosing(feed.events()) as events:
            name, history = parsed(await anext(events))
            assert (name, len(history)) == ("history", 10)
            assert set(history[0]["tiers"]) == {"interactive", "standard", "batch"}
            name, first = parsed(await anext(events))
            assert (name, first["time_s"]) == ("snapshot", history[-1]["t"])
            for _ in range(5):  # nobody reads meanwhile
                await feed.look()
            _, newest = parsed(await anext(events))
            assert newest["time_s"] == first["time_s"] + 5
            film.fail = True
            await feed.look()  # is logged, and ends nothing
            film.fail = False
            await feed.look()
            _, after = parsed(await anext(events))
            assert after["time_s"] == newest["time_s"] + 1
            await feed.close()
            with pytest.raises(StopAsyncIteration):
                await anext(events)
        assert feed.viewers == 0

    asyncio.run(scenario())


def test_history_and_viewers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        feed = Feed(Film())
        for _ in range(feeds.KEPT + 50):
            await feed.look()
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(feeds.MAX_VIEWERS):
                events = await stack.enter_async_context(contextlib.aclosing(feed.events()))
                _, history = parsed(await anext(events))
            assert len(history) == feeds.KEPT
            with pytest.raises(OverloadedError, match="watch the dashboard already"):
                await anext(feed.events())
        assert feed.viewers == 0

    asyncio.run(scenario())


def test_a_viewer_that_leaves_is_noticed() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            feed = open_.ports.views.present().feed
            port = int(open_.http.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /dashboard/events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200" in await reader.readline()
            await until(lambda: feed.viewers == 1)
            writer.close()
            await until(lambda: feed.viewers == 0)

    asyncio.run(scenario())


def test_the_page_needs_nothing_from_anywhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\s\"'<>]+", text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text) == ['<link rel="icon" href=']
    assert "innerHTML" not in text
    assert "eval(" not in text


def test_the_page_may_run_its_own_script_and_talk_to_its_own_server_only() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            policy = (await fetch(f"{open_.http}/dashboard")).headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "connect-src 'self'" in policy
            assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}';", policy)

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def _busy() -> AsyncIterator[Open]:
    """A server with streams, a switch and a key-free dashboard."""
    async with opened(OpsOptions(metrics_port=0), says("word ", end=False)) as open_:
        for tier in ("interactive", "standard"):
            await ask(open_.run.stub, max_tokens=5, tier=tier)
        await open_.run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp2+tp1x2"))
        yield open_


async def _look(open_: Open, work: Callable[[Browser, str], Any]) -> Any:
    def in_browser() -> Any:
        assert CHROMIUM is not None
        with Browser(CHROMIUM) as browser:
            result = work(browser, f"{open_.http}/dashboard")
            assert browser.problems == []
            return result

    return await asyncio.to_thread(in_browser)


_TEXT = "document.querySelector({}).innerText"


@needs_chromium
def test_a_person_sees_the_cell_live(tmp_path: Path) -> None:
    def work(browser: Browser, url: str) -> None:
        browser.size(1240, 1000)
        browser.scheme("dark")
        browser.open(url)
        browser.wait("Number(document.documentElement.dataset.snapshots) >= 2", 30)
        text = browser.evaluate("document.body.innerText")
        for words in ("fake", "serving", "tp2+tp1x2", "TP 2", "TP 1", "mixed", "interactive", "100 %"):
            assert words in text, words
        assert browser.evaluate("document.querySelectorAll('.device').length") == 4
        assert browser.evaluate("document.querySelectorAll('.instance').length") == 3
        assert "tp1x4 → tp2+tp1x2" in browser.evaluate(_TEXT.format("'#switches'"))
        assert "asked for by an administrator" in browser.evaluate(_TEXT.format("'#decisions'"))
        assert browser.evaluate("document.querySelectorAll('#plot-goodput path').length") == 3
        colours = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert colours == "rgb(16, 17, 19)"  # its reader prefers dark
        browser.evaluate("document.querySelector('#theme').click()")
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(245, 245, 242)"
        for width, mobile in ((1240, False), (768, False), (390, True), (320, True)):
            browser.size(width, 800, mobile=mobile)
            wide = browser.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"at {width} px the page is {wide} px wide"
        browser.screenshot(tmp_path / "phone.png")
        assert (tmp_path / "phone.png").read_bytes().startswith(b"\x89PNG")

    async def scenario() -> None:
        async with _busy() as open_:
            await _look(open_, work)

    asyncio.run(scenario())


@needs_chromium
def test_what_is_compiled_is_shown_for_as_long_as_somebody_waits() -> None:
    async def scenario() -> None:
        async with _busy() as open_:
            open_.run.engine.hold()
            call = open_.run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp4"))
            asking = asyncio.ensure_future(call)
            loop = asyncio.get_running_loop()

            def work(browser: Browser, url: str) -> None:
                browser.open(url)
                browser.wait("!document.querySelector('#compiling').hidden", 30)
                text = browser.evaluate(_TEXT.format("'#compiling'"))
                for words in ("compiling tp4", "1 of 4 executables ready", "decode of 32 at TP 4", "7 more queued"):
                    assert words in text, words
                bar = "document.querySelector('#compiling [role=progressbar]')"
                assert browser.evaluate(f"{bar}.getAttribute('aria-valuenow')") == "38"  # 2 of 4 compiled, 1 tried
                browser.size(320, 800, mobile=True)
                assert browser.evaluate("document.documentElement.scrollWidth") <= 320
                loop.call_soon_threadsafe(open_.run.engine.release)
                browser.wait("document.querySelector('#compiling').hidden", 30)

            await _look(open_, work)
            await asking

    asyncio.run(scenario())


@needs_chromium
def test_names_from_outside_are_text_and_a_lost_server_is_shown() -> None:
    async def scenario() -> None:
        async with _busy() as open_:
            layout_log = open_.ports.views.present().layout_log
            layout_log.decide("tp4", "<img src=x onerror=\"document.title='owned'\"><b>bold</b>")
            stopped = asyncio.Event()
            loop = asyncio.get_running_loop()

            def work(browser: Browser, url: str) -> None:
                browser.open(url)
                browser.wait("document.body.innerText.includes('onerror')", 30)
                assert browser.evaluate("document.querySelectorAll('#decisions img, #decisions b').length") == 0
                assert browser.evaluate("document.title") == "nitsum · fake"
                assert (
                    browser.evaluate("fetch('https://127.0.0.1:1/').then(() => 'let out', () => 'kept in')")
                    == "kept in"
                )
                browser.problems.clear()  # of the fetch that its policy forbids
                loop.call_soon_threadsafe(stopped.set)
                browser.wait("document.querySelector('#state').dataset.state === 'lost'", 30)
                browser.problems.clear()  # the connection that ended

            looking = asyncio.create_task(_look(open_, work))
            waiting = asyncio.create_task(stopped.wait())
            await asyncio.wait({looking, waiting}, return_when=asyncio.FIRST_COMPLETED)
            await open_.ports.stop()
            waiting.cancel()
            await looking

    asyncio.run(scenario())


def test_the_pictures_of_the_docs_are_small() -> None:
    folder = PAGE.parents[4] / "docs" / "img"
    for name in ("light", "dark"):
        data = (folder / f"dashboard-{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000
