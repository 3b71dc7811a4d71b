"""Tiers: validation, lookup, and one-line errors that point into the file."""

import dataclasses
import math
import pathlib
from typing import Any

import pytest

from nitsum_jax.control.tiers import DEFAULT_TIERS, Tier, TierSet, parse_tiers, read_tiers, tiers_toml
from nitsum_jax.errors import InvalidInputError

GOOD = """
# two tiers
[tiers.chat]
ttft_ms = 500
tpot_ms = 12.5
weight = 4

[tiers."night.batch"]
tpot_ms = 200
ttft_ms = 10_000
"""


def test_defaults() -> None:
    assert DEFAULT_TIERS.names == ("interactive", "standard", "batch")
    assert [(t.ttft_ms, t.tpot_ms, t.weight) for t in DEFAULT_TIERS] == [
        (500, 50, 1),
        (2_000, 100, 1),
        (60_000, 1_000, 1),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "two words"},
        {"name": "-dash"},
        {"name": "new\nline"},
        {"name": "x" * 65},
        {"name": 3},
        {"ttft_ms": 0},
        {"ttft_ms": -1.0},
        {"tpot_ms": math.nan},
        {"tpot_ms": math.inf},
        {"tpot_ms": "50"},
        {"tpot_ms": True},
        {"weight": 0},
        {"weight": None},
    ],
)
def test_a_tier_out_of_range_is_refused_in_one_line(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"name": "chat", "ttft_ms": 1.0, "tpot_ms": 1.0, "weight": 1.0}
    Tier(**good)
    with pytest.raises(InvalidInputError) as error:
        Tier(**(good | change))
    assert "\n" not in str(error.value)
    assert next(iter(change)).split("_")[0] in str(error.value)


def test_tiers_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT_TIERS.get("batch").ttft_ms = 1  # type: ignore[misc]


def test_tiers_are_read_as_they_were_written() -> None:
    tiers = TierSet((Tier("chat", 300, 6.25), Tier("batch", 1e4, 1e-3, weight=0.5)))
    assert parse_tiers(tiers_toml(tiers), "t") == tiers


def test_lookup() -> None:
    assert DEFAULT_TIERS.get("standard").ttft_ms == 2_000
    assert "batch" in DEFAULT_TIERS
    assert "night" not in DEFAULT_TIERS
    assert len(DEFAULT_TIERS) == 3
    with pytest.raises(InvalidInputError, match=r"^unknown tier 'Batch': use one of interactive, standard, batch$"):
        DEFAULT_TIERS.get("Batch")


def test_a_set_needs_tiers_of_different_names() -> None:
    with pytest.raises(InvalidInputError, match="at least one"):
        TierSet(())
    with pytest.raises(InvalidInputError, match="'a' is defined twice"):
        TierSet((Tier("a", 1, 1), Tier("b", 1, 1), Tier("a", 2, 2)))


def test_reads_a_file_in_order(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tiers.toml"
    path.write_text(GOOD)
    assert read_tiers(path).tiers == (Tier("chat", 500, 12.5, 4), Tier("night.batch", 10_000, 200))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tiers.a\n", "f.toml: not valid TOML: .*line 1"),
        ("[tiers.a]\nttft_ms = 1\nttft_ms = 2\n", "f.toml: not valid TOML: .*line 3"),
        ("", "f.toml: no tiers: add a table"),
        ("tiers = 3\n", "f.toml: no tiers: add a table"),
        ("[tiers]\n", "f.toml: no tiers: add a table"),
        ("[tiers.a]\nttft_ms = 1\ntpot_ms = 1\n\n[tier.b]\n", "f.toml(:5)?: unknown entry 'tier'"),
        ("[other]\nx = 1\n", "f.toml:1: unknown entry 'other'"),
        ("[tiers]\na = 3\n", r"f.toml:2: tier 'a' must be a table: write \[tiers.a\]"),
        ("[tiers.a]\nttft_ms = 1\n", "f.toml:1: tier 'a': tpot_ms is missing"),
        (
            "# note\n[tiers.a]\nttft_ms = 1\ntpot_ms = 1\nttft = 5\n",
            "f.toml:5: tier 'a': unknown key 'ttft': use ttft_ms,",
        ),
        ("[tiers.a]\nttft_ms = 1\ntpot_ms = 0\n", "f.toml:3: tier 'a': tpot_ms=0 must be"),
        (
            "[tiers.a]\nttft_ms = 1\ntpot_ms = 1\n[tiers.b]\ntpot_ms = 1\nttft_ms = 'x'\n",
            "f.toml:6: tier 'b': ttft_ms='x'",
        ),
        ("[tiers.a]\nttft_ms = 1\ntpot_ms = 1\nweight = nan\n", "f.toml:4: tier 'a': weight=nan"),
        ("[tiers]\na = {ttft_ms = 1, tpot_ms = -1}\n", "f.toml:2: tier 'a': tpot_ms=-1"),
        ("[tiers.'two words']\nttft_ms = 1\ntpot_ms = 1\n", "f.toml:1: tier name 'two words' is not valid"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_place(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=f"^{message}") as error:
        parse_tiers(text, "f.toml")
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: pathlib.Path) -> None:
    missing = tmp_path / "none.toml"
    with pytest.raises(InvalidInputError, match=r"none\.toml: cannot read the tiers file: No such file"):
        read_tiers(missing)
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"# caf\xe9\n")
    with pytest.raises(InvalidInputError, match=r"latin\.toml: the tiers file is not UTF-8 text \(byte 5\)"):
        read_tiers(latin)
