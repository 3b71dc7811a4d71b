"""Several cells behind one server: a box for each on the dashboard, and metrics with its name."""

import asyncio

from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations.dashboard.snapshot import point
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import ask, says
from tests.server.operations.chromium import CHROMIUM, needs_chromium
from tests.server.operations.fake_cells import FakeCells
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened
from tools.browser import Browser


def test_metrics_have_the_name_of_the_cell() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0), make=FakeCells) as open_:
            text = (await fetch(f"{open_.http}/metrics")).text
        lines = set(text.splitlines())
        for line in (
            'nitsum_cell_info{cell="left",layout="tp2",model_name="fake",state="serving"} 1.0',
            'nitsum_cell_info{cell="new",layout="",model_name="fake",state="joining"} 1.0',
            'nitsum_cell_running_requests{cell="left",model_name="fake"} 3.0',
            'nitsum_cell_queued_requests{cell="left",model_name="fake"} 1.0',
            'nitsum_cell_kv_cache_usage_perc{cell="left",model_name="fake"} 0.75',
            'nitsum_cell_generation_tokens_total{cell="right",model_name="fake"} 66.0',
            'nitsum_cell_attainment_ratio{cell="left",model_name="fake",tier="interactive"} 0.75',
        ):
            assert line in lines, line
        assert 'nitsum_cell_running_requests{cell="new"' not in text  # nobody knows yet

    asyncio.run(scenario())


def test_a_server_that_is_one_cell_has_none_of_it() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0)) as open_:
            assert "nitsum_cell_" not in (await fetch(f"{open_.http}/metrics")).text
            snapshot = open_.ports.views.present().snapshot()
            assert snapshot.cells == ()
            assert "cells" not in point(snapshot)

    asyncio.run(scenario())


def test_decisions_of_all_cells_are_one_list_in_the_order_of_time() -> None:
    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0), make=FakeCells) as open_:
            await open_.run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp2+tp1x2"))
            snapshot = open_.ports.views.present().snapshot()
        assert [(one.cell, one.choice) for one in snapshot.decisions] == [
            ("right", "tp1x2"),
            ("left", "tp2"),
            ("", "tp2+tp1x2"),  # of an administrator, for all
        ]
        assert [one.cell for one in snapshot.switches] == ["left", ""]
        cells = point(snapshot)["cells"]
        assert isinstance(cells, dict)
        assert cells["left"] == {"tokens": 1234, "tiers": {"interactive": (0.75, 0.05), "standard": (1.0, 0.0333)}}

    asyncio.run(scenario())


@needs_chromium
def test_a_person_sees_all_cells_and_then_one() -> None:
    def work(url: str) -> None:
        assert CHROMIUM is not None
        with Browser(CHROMIUM) as browser:
            browser.size(1240, 1000)
            browser.open(url)
            browser.wait("Number(document.documentElement.dataset.snapshots) >= 2", 30)
            text = browser.evaluate("document.querySelector('#cell').innerText")
            for words in ("left", "right", "new", "joining", "3 running, 1 waiting", "KV 75 %"):
                assert words in text, words
            assert browser.evaluate("document.querySelector('#cell-title').textContent") == "3 cells"
            per_cell = (
                "[...document.querySelectorAll('.onecell')].map((c) => c.querySelectorAll('.device').length).join()"
            )
            assert browser.evaluate(per_cell) == "2,2,0"
            assert "cell left: chat needs it" in browser.evaluate("document.querySelector('#decisions').innerText")
            all_tokens = browser.evaluate("document.querySelector('#rate-note').textContent")
            browser.evaluate("document.querySelector('[data-cell=left]').click()")
            assert browser.evaluate("document.querySelector('#attainment').textContent") == "83 %"  # 5 of 6
            assert browser.evaluate("document.querySelector('#goodput').textContent") == "0.08"
            assert browser.evaluate("document.querySelector('#rate-note').textContent") == "1.23K tokens of cell left"
            assert browser.evaluate("document.querySelector('#kv').textContent") == "75 %"
            for width, mobile in ((1240, False), (320, True)):
                browser.size(width, 800, mobile=mobile)
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
            browser.evaluate("document.querySelector('[data-cell=left]').click()")
            assert browser.evaluate("document.querySelector('#rate-note').textContent") == all_tokens
            assert browser.problems == []

    async def scenario() -> None:
        async with opened(OpsOptions(metrics_port=0), says("word ", end=False), make=FakeCells) as open_:
            await ask(open_.run.stub, max_tokens=5, tier="interactive")
            await open_.run.stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout="tp2+tp1x2"))
            await asyncio.to_thread(work, f"{open_.http}/dashboard")

    asyncio.run(scenario())
