"""Pictures of the dashboard for the docs: `python tools/screenshot_dashboard.py` (needs Chromium).

Without --url it shows a cell that exists only on paper (tools/sample_cell.py); with it, a server that runs.
"""

import argparse
import asyncio
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence

if __name__ == "__main__":  # started by its path: the root of the repository is not on the import path then
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from starlette.applications import Starlette

from nitsum_jax.server.http.server import HttpServer
from nitsum_jax.server.operations.dashboard.feed import Feed
from nitsum_jax.server.operations.dashboard.snapshot import DashboardSnapshot
from nitsum_jax.server.operations.routes import dashboard_routes
from nitsum_jax.server.state import ServerPhase, ServerState
from tools.browser import Browser, find_chromium
from tools.sample_cell import sample

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "img"


PICTURES = {"light": ("light", 1240, False), "dark": ("dark", 1240, False), "phone": ("light", 390, True)}
"""By the last part of their names: colour scheme, width, and whether it is a phone."""


class _Film:
    """A StatusSource that plays snapshots."""

    def __init__(self, frames: Iterator[DashboardSnapshot]) -> None:
        self._frames = list(frames)

    def __len__(self) -> int:
        return len(self._frames)

    def snapshot(self) -> DashboardSnapshot:
        return self._frames.pop(0) if len(self._frames) > 1 else self._frames[0]


def shoot(url: str, out: pathlib.Path, chromium: str, names: Sequence[str]) -> None:
    """Writes a picture for each of the names."""
    with Browser(chromium) as browser:
        for name in names:
            scheme, width, mobile = PICTURES[name]
            browser.scheme(scheme)
            browser.size(width, 900, mobile=mobile)
            browser.open("about:blank")
            browser.open(url)
            browser.wait("document.documentElement.dataset.snapshots")
            height = browser.evaluate("document.documentElement.scrollHeight")
            browser.size(width, height, mobile=mobile)
            time.sleep(1.0)  # transitions
            browser.screenshot(out / f"dashboard-{name}.png")
        if browser.problems:
            raise SystemExit(f"the page has problems: {browser.problems}")


async def _with_sample(out: pathlib.Path, chromium: str, names: Sequence[str]) -> None:
    state = ServerState()
    state.phase = ServerPhase.SERVING
    film = _Film(sample(time.time() - 600))
    feed = Feed(film, interval_s=1.0)
    for _ in range(len(film)):
        await feed.look()
    server = HttpServer(Starlette(routes=dashboard_routes(lambda: feed)), "127.0.0.1", 0)
    await server.start()
    try:
        await asyncio.to_thread(shoot, f"http://127.0.0.1:{server.port}/dashboard", out, chromium, names)
    finally:
        await feed.close()
        await server.stop()


def main() -> int:
    """Takes the pictures and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="dashboard of a server that runs")
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder for the pictures")
    parser.add_argument(
        "--pictures", nargs="+", choices=PICTURES, default=["light", "dark"], help="which; light and dark if not given"
    )
    arguments = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.stderr.write("no Chromium is found: install it (apt-get install chromium), or name it in NITSUM_CHROMIUM\n")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.url:
        shoot(arguments.url, arguments.out, chromium, arguments.pictures)
    else:
        asyncio.run(_with_sample(arguments.out, chromium, arguments.pictures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
