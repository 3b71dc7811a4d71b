"""Reports: all parts are there, the page is valid and loads nothing, and the pictures say what the logs say."""

import base64
import dataclasses
import html.parser
import json
import pathlib
import re
import xml.etree.ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nitsum_jax.control.plan import homogeneous
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.sim.report import compare, figures, page, style
from nitsum_jax.sim.report.page import report, write_report
from nitsum_jax.sim.report.runs import ReportedRun, open_run
from nitsum_jax.sim.report.spans import Span, nice_interval, spans_of
from nitsum_jax.sim.runs.records import SwitchRecord
from tests.sim.small_run import DEVICES, MIXED, run, workload

_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(html.parser.HTMLParser):
    """Tags in balance, ids once, pictures described, nothing loaded."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.images: list[str] = []
        self.wrong: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in _VOID:
            self.open.append(tag)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag in {"script", "link", "iframe", "object", "embed"}:
            self.wrong.append(f"<{tag}>")
        if tag == "img":
            self.images.append(str(values["src"]))
            if not values.get("alt"):
                self.wrong.append("a picture without alt")
        for name in ("src", "href", "action", "srcset", "poster"):
            if name in values and not str(values[name]).startswith("data:image/svg+xml;base64,"):
                self.wrong.append(f"{name}={values[name]}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def checked(text: str) -> Checker:
    """The page, after all that any page must keep to."""
    assert text.startswith("<!DOCTYPE html>")
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.wrong == []
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert "//" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert "@import" not in text
    assert "url(" not in text
    for image in checker.images:
        picture = base64.b64decode(image.partition(",")[2]).decode()
        root = xml.etree.ElementTree.fromstring(picture)
        assert root.tag.endswith("svg")
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    return checker


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    root = tmp_path_factory.mktemp("runs")
    made: list[pathlib.Path] = []
    for policy, then in (("adaptive", None), ("static <tp2>", MIXED)):
        for scale in (1.0, 2.0):
            folder = root / f"run-{len(made)}"
            run(folder, workload(6 * scale, seconds=4), then=then, policy=policy, rate_scale=scale)
            made.append(folder)
    return made


def test_a_report_of_one_run(folders: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.html"
    write_report(folders[:1], path, title="One & only")
    text = path.read_text(encoding="utf-8")
    checker = checked(text)
    assert len(checker.images) == 2
    assert {"summary", "tiers", "run-1", "words"} <= set(checker.ids)
    assert "rates" not in checker.ids
    words = " ".join(" ".join(checker.text).split())
    assert "One & only" in words
    assert "small, roofline, 4 devices" in words
    summary = json.loads((folders[0] / "summary.json").read_text())
    total = summary["total"]
    assert f"{total['goodput']:.2f}/s goodput" in words
    assert f"{total['met']:,} of {total['requests']:,} requests" in words
    assert "1 switches" in words
    for tier in ("chat", "batch"):
        assert tier in words


def test_a_report_of_several_runs(folders: list[pathlib.Path]) -> None:
    runs = [open_run(folder) for folder in folders]
    text = report(runs, most_detailed=1)
    checker = checked(text)
    assert len(checker.images) == 1 + 2
    assert "rates" in checker.ids
    words = " ".join(" ".join(checker.text).split())
    assert "3 more runs have logs that are not drawn here." in words
    assert "static <tp2>" in words
    assert "<tp2>" not in text  # a name is never markup
    assert text == report(runs, most_detailed=1)


def test_runs_without_logs_are_compared(folders: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    copies = []
    for i, folder in enumerate(folders):
        copies.append(tmp_path / str(i))
        copies[-1].mkdir()
        (copies[-1] / "summary.json").write_text((folder / "summary.json").read_text())
    write_report(copies, tmp_path / "report.html")
    assert len(checked((tmp_path / "report.html").read_text()).images) == 1


def test_what_cannot_be_reported(folders: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match="at least one run"):
        report([])
    with pytest.raises(InvalidInputError, match="cannot read the summary"):
        open_run(tmp_path)
    with pytest.raises(InvalidInputError, match="cannot write the report"):
        write_report(folders[:1], tmp_path / "none" / "report.html", most_detailed=0)
    good = json.loads((folders[0] / "summary.json").read_text())
    changes: list[dict[str, object]] = [{"seconds": 0}, {"rate": "x"}, {"tiers": {}}, {"targets": {}}, {"targets": 3}]
    for change in (*changes, {"total": {"attainment": 2}}):
        (tmp_path / "summary.json").write_text(json.dumps(good | change))
        with pytest.raises(InvalidInputError, match=r"summary\.json: not the summary of a run") as e:
            open_run(tmp_path)
        assert "\n" not in str(e.value)


def test_figures_say_what_the_logs_say(folders: list[pathlib.Path]) -> None:
    one = open_run(folders[0])
    logs = one.logs()
    with style.drawing():
        load, attained, layout, busy = figures.timeline(one, logs).axes
        left, right = figures.latencies(one, logs.requests).axes
    assert load.get_title(loc="left").startswith("Load")
    assert [line.get_label() for line in attained.lines[1:]] == ["chat", "batch"]
    # Two instances of TP=2 before the switch, four of TP=1 after it.
    wide, narrow = layout.collections
    assert [len(c.get_paths()) for c in (wide, narrow)] == [2, 4]
    assert wide.get_facecolor().tolist() != narrow.get_facecolor().tolist()  # type: ignore[union-attr]
    for bars, devices in ((wide, 2), (narrow, 1)):
        for bar in bars.get_paths():
            assert bar.get_extents().height == pytest.approx(devices, abs=0.2)
    assert wide.get_paths()[0].get_extents().x1 == pytest.approx(logs.switches[0].time_s)
    assert busy.get_xlabel() == "seconds"
    for axes, target in ((left, [300, 5000]), (right, [12, 100])):
        dashed = [float(line.get_xdata()[0]) for line in axes.lines if len(set(line.get_xdata())) == 1]  # type: ignore[arg-type,index]
        assert set(target) <= set(dashed)
        for line in axes.lines:
            if len(line.get_xdata()) > 2:  # type: ignore[arg-type]
                y = line.get_ydata()
                assert (y[0], y[-1]) == (0, 1)  # type: ignore[index]


def test_a_run_in_which_nothing_ended_can_be_drawn(folders: list[pathlib.Path]) -> None:
    one = open_run(folders[0])
    logs = one.logs()
    nothing = [dataclasses.replace(r, first_token_s=None, finish_s=None, met=False) for r in logs.requests.records]
    empty = dataclasses.replace(
        logs, requests=type(logs.requests).of(nothing), steps=type(logs.steps).of([]), switches=()
    )
    with style.drawing():
        for figure in (figures.timeline(one, empty), figures.latencies(one, empty.requests)):
            assert style.svg_uri(figure).startswith("data:image/svg+xml;base64,")


def test_a_run_without_its_steps_has_no_utilisation(folders: list[pathlib.Path]) -> None:
    one = open_run(folders[0])
    logs = one.logs()
    with style.drawing():
        panels = figures.timeline(one, dataclasses.replace(logs, steps=type(logs.steps).of([]))).axes
    assert [p.get_title(loc="left") for p in panels] == ["Load and goodput, by time of arrival", "Attainment", "Layout"]
    assert panels[-1].get_xlabel() == "seconds"


# Layouts over time


def test_spans_follow_the_switches(folders: list[pathlib.Path]) -> None:
    logs = open_run(folders[0]).logs()
    switches = (
        SwitchRecord(10, "tp2@0,1/chat+tp1@2+tp1@3", "tp2@0,1/batch+tp2@2,3:prefill", (2, 3), 0.5, 0, 0, 0),
        SwitchRecord(20, "tp2@0,1/batch+tp2@2,3:prefill", "tp4@0,1,2,3", (0, 1, 2, 3), 0.25, 0, 0, 0),
    )
    found = spans_of(dataclasses.replace(logs, switches=switches), 30)
    assert found == [
        Span(0, 20, (0, 1), "mixed"),  # other tiers are no other instance
        Span(0, 10, (2,), "mixed"),
        Span(0, 10, (3,), "mixed"),
        Span(10.5, 20, (2, 3), "prefill"),
        Span(20.25, 30, (0, 1, 2, 3), "mixed"),
    ]
    assert [s.tp for s in found] == [2, 1, 1, 2, 4]
    assert Span(0, 1, (0, 2, 3, 7), "mixed").runs() == [(0, 1), (2, 2), (7, 1)]


def test_spans_without_layouts_are_told_from_the_steps(folders: list[pathlib.Path]) -> None:
    logs = open_run(folders[0]).logs()
    bare = dataclasses.replace(logs, switches=(), summary=logs.summary | {"layout": ""})
    found = spans_of(bare, 4)
    assert {s.devices for s in found} == {(0, 1), (2, 3), (0,), (1,), (2,), (3,)}
    switch_s = logs.switches[0].time_s
    for span in found:
        assert (span.end_s <= switch_s + 1e-9) if span.tp == 2 else (span.start_s >= switch_s)
    still = dataclasses.replace(logs, switches=(), summary=logs.summary | {"layout": homogeneous(DEVICES, 4).placed})
    assert spans_of(still, 4) == [Span(0, 4, (0, 1, 2, 3), "mixed")]


@given(st.floats(0.5, 1e5), st.floats(0, 100))
def test_intervals_are_wide_enough(seconds: float, rate: float) -> None:
    found = nice_interval(seconds, rate)
    assert 0 < found <= seconds
    assert seconds / found <= 100.0001
    assert rate == 0 or rate * found >= 19.99 or found == seconds


# Comparisons


@pytest.mark.parametrize(
    ("attainments", "expected"),
    [([1, 0.95, 0.85, 0.2], 2.5), ([1, 1, 1, 1], None), ([0.5, 0.4, 0.3, 0.2], None), ([0.9, 0.9, 0.8, 0.95], 2.0)],
)
def test_capacity(attainments: list[float], expected: float | None) -> None:
    found = compare.capacity([1, 2, 3, 4], attainments)
    assert found == (None if expected is None else pytest.approx(expected))


def fake(policy: str, rate: float, attainment: float, workload: str = "w") -> ReportedRun:
    tier = {"attainment": attainment}
    summary = {"policy": policy, "rate": rate, "total": tier, "workload": workload, "seconds": 1}
    return ReportedRun(pathlib.Path("x"), summary)


def test_lines_over_the_rate_are_sorted_by_capacity() -> None:
    rates = (1.0, 2.0, 3.0)
    runs = [fake("good", r, a) for r, a in zip(rates, (1, 1, 0.5), strict=True)]
    runs += [fake("adaptive", r, a) for r, a in zip(rates, (1, 1, 0.95), strict=True)]
    runs += [fake("bad", r, a) for r, a in zip(rates, (0.5, 0.4, 0.3), strict=True)]
    runs.append(fake("bad", 1.0, 0.7))  # another seed
    with style.drawing():
        (axes,) = compare.attainment_by_rate(runs).axes
    legend = axes.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["adaptive: above 3/s", "good: 2.2/s", "bad: below 1/s"]
    line = next(line for line in axes.lines if str(line.get_label()).startswith("bad"))
    assert list(line.get_ydata()) == pytest.approx([0.6, 0.4, 0.3])  # type: ignore[arg-type]


def test_one_rate_gives_bars_and_settings_panels() -> None:
    runs = [
        fake("a", 1, 0.5),
        fake("b", 1, 0.9),
        fake("a", 1, 0.5, "v"),
        fake("b", 2, 0.9, "v"),
        fake("c", 1, 1, "alone"),
    ]
    assert compare.comparable(runs)
    assert not compare.comparable(runs[:1])
    with style.drawing():
        panels = compare.attainment_by_rate(runs).axes
    assert [p.get_title(loc="left") for p in panels] == ["w", "v"]
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["a (1/s)", "b (1/s)"]
    assert sorted(p.get_width() for p in panels[0].patches) == [0.5, 0.9]  # type: ignore[attr-defined]


def test_numbers_do_not_promise_too_much() -> None:
    assert page._percent(1) == "100.0 %"
    assert page._percent(0.99999) == "99.9 %"
    assert page._percent(0.5) == "50.0 %"
    assert [page._number(v) for v in (0, 3.14159, 99.5, 12345.6)] == ["0", "3.14", "99.5", "12,346"]
    assert page._number(None) == page._percent(None)


def test_large_cells_and_many_switches_stay_small(folders: list[pathlib.Path]) -> None:
    """512 devices that switch 100 times: more bars than are drawn one by one."""
    one = open_run(folders[0])
    logs = one.logs()
    roles = ("", ":prefill")
    layouts = ["+".join(f"tp4@{d},{d + 1},{d + 2},{d + 3}{role}" for d in range(0, 512, 4)) for role in roles]
    switches = tuple(
        SwitchRecord(0.04 * i + 0.02, layouts[i % 2], layouts[1 - i % 2], tuple(range(512)), 0.001, 0, 0, 0)
        for i in range(100)
    )
    large = ReportedRun(one.folder, {**one.summary, "devices": 512})
    with style.drawing():
        address = style.svg_uri(figures.timeline(large, dataclasses.replace(logs, switches=switches)))
    assert len(address) < 500_000
