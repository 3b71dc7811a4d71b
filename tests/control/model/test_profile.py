import json
import pathlib
from typing import Any

import pytest

from nitsum_jax.control.model.grids import Line, Plane
from nitsum_jax.control.model.profile import parse_profile, read_profile, to_json, write_profile
from nitsum_jax.errors import InvalidInputError
from tests.control.profiles import roofline_profile


def document() -> dict[str, Any]:
    return json.loads(to_json(roofline_profile((1, 2))))


def refused(doc: object) -> str:
    with pytest.raises(InvalidInputError) as caught:
        parse_profile(doc if isinstance(doc, str) else json.dumps(doc), "p.json")
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_reads_back_as_the_same_profile(tmp_path: pathlib.Path) -> None:
    profile = roofline_profile()
    assert parse_profile(to_json(profile), "x") == profile
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile


def test_tps_come_in_ascending_order() -> None:
    doc = document()
    doc["tps"] = dict(reversed(doc["tps"].items()))
    assert tuple(parse_profile(json.dumps(doc), "x").tps) == (1, 2)


def test_files_that_cannot_be_read_or_written(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InvalidInputError, match=r"none\.json: cannot read the profile: No such file"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(InvalidInputError, match=r"p\.json: cannot write the profile: No such file"):
        write_profile(roofline_profile(), tmp_path / "none" / "p.json")
    (tmp_path / "b.json").write_bytes(b"\xff")
    with pytest.raises(InvalidInputError, match="not UTF-8 text"):
        read_profile(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "a": 1,\n b}', "p.json:3: not valid JSON: "),
        ("[]", 'p.json: not a profile: "schema" must be "nitsum-profile/1", not None'),
        ('{"schema": "nitsum-profile/2"}', "not 'nitsum-profile/2'"),
        ('{"a": 1, "a": 2}', "p.json: entry 'a' stands twice"),
    ],
)
def test_text_that_is_no_profile(text: str, says: str) -> None:
    assert says in refused(text)


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("model", "", "p.json: model='' must be a text"),
        ("mixed_steps", 1, "p.json: mixed_steps=1 must be true or false"),
        ("devices", 0, "p.json: devices=0 must be a whole number, at least 1"),
        ("page_size", 1.5, "p.json: page_size=1.5 must be a whole number"),
        ("host_overhead_s", -1, "p.json: host_overhead_s=-1 must be a number, at least 0"),
        ("link_bytes_per_s", float("inf"), "p.json: link_bytes_per_s=inf must be a number, at least 1"),
        ("devices", 1, "p.json: tps: 2 must be a power of two, at most the 1 devices"),
        ("tps", {}, "p.json: tps is empty"),
        ("tps", [], "p.json: tps must be an object"),
        ("tps", {"02": {}}, "p.json: tps: '02' must be a TP"),
        ("tps", {"2": []}, "p.json: tps.2 must be an object with kv_capacity_tokens, dense"),
    ],
)
def test_entry_out_of_its_range(entry: str, value: object, says: str) -> None:
    assert says in refused(document() | {entry: value})


def test_missing_and_unknown_entries() -> None:
    doc = document()
    del doc["page_size"]
    assert refused(doc) == "p.json: page_size is missing"
    assert "p.json: unknown entry 'colour': use schema, name" in refused(document() | {"colour": 1})
    doc = document()
    del doc["tps"]["2"]["dense"]["tokens"]
    assert refused(doc) == "p.json: tps.2.dense: tokens is missing"


def change(tp: str, part: str, entry: str, value: object) -> dict[str, Any]:
    doc = document()
    doc["tps"][tp][part][entry] = value
    return doc


@pytest.mark.parametrize(
    ("part", "entry", "value", "says"),
    [
        ("dense", "tokens", 5, "p.json: tps.2.dense: tokens must be a list"),
        ("dense", "tokens", [1], "p.json: tps.2.dense: points has 1 entries: give at least two"),
        ("head", "rows", [1, 3, 3], "p.json: tps.2.head: points[2]=3 must be above points[1]=3"),
        ("head", "rows", [1, "2", 3], "p.json: tps.2.head: points[1]='2' must be a whole number"),
        ("head", "rows", [2, 3, 4], "p.json: tps.2: head.rows begins with 2: it must begin with 1"),
        ("head", "seconds", [1, 2], "p.json: tps.2.head: seconds has 2 entries: give 3"),
        ("head", "seconds", [1, 2, True], "p.json: tps.2.head: seconds[2]=True must be a number of seconds"),
        ("head", "seconds", [1, 3, 2], "seconds[2]=2 is below the one before, 3: more work cannot take less"),
        ("decode_attention", "seconds", [1], "p.json: tps.2.decode_attention: seconds[0] must be a list"),
        ("decode_attention", "seconds", [[1]], "seconds has 1 lists: give one for each of 5 rows"),
    ],
)
def test_tables_that_are_not_sound(part: str, entry: str, value: object, says: str) -> None:
    assert says in refused(change("2", part, entry, value))


@pytest.mark.parametrize("capacity", [0, 1.5, None])
def test_capacity(capacity: object) -> None:
    doc = document()
    doc["tps"]["1"]["kv_capacity_tokens"] = capacity
    assert f"p.json: tps.1: kv_capacity_tokens={capacity!r} must be a whole number, at least 1" in refused(doc)


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (((1, 2, 1.5), (1, 2, 3)), r"seconds\[0\]\[2\]=1.5 is below"),
        (((1, 2, 3), (0.5, 2, 3)), r"seconds\[1\]\[0\]=0.5 is below"),
        (((1, 2, 4), (2, 3, 4)), "last step along columns falls from 2 to 1"),
        (((1, 2, 3), (3, 3.5, 4.5)), "last step along rows falls from 2 to 1.5"),
    ],
)
def test_planes_that_would_fall(seconds: tuple[tuple[float, ...], ...], says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        Plane((1, 2), (0, 1, 2), seconds)


def test_tables_read_between_and_beyond_their_points() -> None:
    line = Line((1, 3, 5), (1.0, 2.0, 4.0))
    assert [line.at(x) for x in (1, 2, 4, 5, 7)] == [1.0, 1.5, 3.0, 4.0, 6.0]
    plane = Plane((1, 3), (0, 10), ((1.0, 2.0), (3.0, 6.0)))
    assert [plane.at(1, 5), plane.at(2, 0), plane.at(3, 20), plane.at(5, 0)] == [1.5, 2.0, 9.0, 5.0]
