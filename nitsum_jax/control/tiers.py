"""Latency tiers: what a request may ask for, and the file that names them.

# tiers.toml
[tiers.interactive]
ttft_ms = 500
tpot_ms = 50
weight = 4          # optional, 1 if left out
"""

import dataclasses
import math
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import TIER_NAME

_NAME = re.compile(TIER_NAME)  # as layouts can name it
_REQUIRED = ("ttft_ms", "tpot_ms")
_KNOWN = (*_REQUIRED, "weight")
LEAST_TARGET_MS, MOST_TARGET_MS = 1.0, 86_400_000.0
"""What a request may name as a target of its own."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tier:
    """A named pair of latency targets.

    Attributes:
      name: what requests call it: letters, digits, and `_.-` after the first character, at most 64.
      ttft_ms: target for the time to the first token, milliseconds.
      tpot_ms: target for the time per output token after the first, milliseconds.
      weight: what one request that met both targets counts in the goodput.

    Raises:
      InvalidInputError: a name or number out of its range (on construction).
    """

    name: str
    ttft_ms: float
    tpot_ms: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidInputError(
                f"tier name {self.name!r} is not valid: use 1 to 64 letters, digits and _ . -, a letter or digit first"
            )
        for field in _KNOWN:
            value: object = getattr(self, field)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
                raise InvalidInputError(f"tier {self.name!r}: {field}={value!r} must be a number above 0")

    def with_targets(self, ttft_ms: float | None, tpot_ms: float | None) -> "Tier":
        """The tier of a request that names targets of its own; None: this tier's."""
        if ttft_ms is None and tpot_ms is None:
            return self
        return dataclasses.replace(self, ttft_ms=ttft_ms or self.ttft_ms, tpot_ms=tpot_ms or self.tpot_ms)

    def scaled(self, scale: float) -> "Tier":
        """On a clock with so many seconds for each of its own: that of a paced cell in slow motion."""
        return dataclasses.replace(self, ttft_ms=self.ttft_ms * scale, tpot_ms=self.tpot_ms * scale)


@dataclasses.dataclass(frozen=True, slots=True)
class TierSet:
    """The tiers that a server knows, in the order they were given.

    Raises:
      InvalidInputError: no tier, or two of one name (on construction).
    """

    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        if not self.tiers:
            raise InvalidInputError("no tiers are defined: give at least one")
        for i, tier in enumerate(self.tiers):
            if tier.name in self.names[:i]:
                raise InvalidInputError(f"tier {tier.name!r} is defined twice: give each tier its own name")

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(tier.name for tier in self.tiers)

    def get(self, name: str) -> Tier:
        """The tier of this name.

        Raises:
          InvalidInputError: there is none; the message names those there are.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise InvalidInputError(f"unknown tier {name!r}: use one of {', '.join(self.names)}")

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[Tier]:
        return iter(self.tiers)

    def __len__(self) -> int:
        return len(self.tiers)


DEFAULT_TIERS = TierSet(
    (
        Tier("interactive", ttft_ms=500, tpot_ms=50),
        Tier("standard", ttft_ms=2_000, tpot_ms=100),
        Tier("batch", ttft_ms=60_000, tpot_ms=1_000),
    )
)
"""For demonstrations: a chat that reads faster than a person does, an ordinary request, and work in the background.
A deployment states its own."""


def parse_tiers(text: str, source: str) -> TierSet:
    """Reads tiers from TOML text.

    Args:
      text: tables `[tiers.NAME]` with ttft_ms, tpot_ms and, if wanted, weight; nothing else.
      source: what error messages call the text, such as its file name.

    Raises:
      InvalidInputError: one line that begins with source, and the line number if it is known.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise InvalidInputError(f"{source}: not valid TOML: {_one_line(e)}") from e
    for key in document:
        if key != "tiers":
            place = _place(source, text, key)
            raise InvalidInputError(f"{place}: unknown entry {key!r}: only [tiers.NAME] tables are allowed here")
    tables = document.get("tiers")
    if not isinstance(tables, dict) or not tables:
        raise InvalidInputError(f"{source}: no tiers: add a table such as [tiers.standard] with ttft_ms and tpot_ms")
    return TierSet(tuple(_tier(name, table, text, source) for name, table in tables.items()))


def read_tiers(path: str | pathlib.Path) -> TierSet:
    """Reads tiers from a TOML file; see parse_tiers.

    Raises:
      InvalidInputError: the file cannot be read, or parse_tiers refuses it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the tiers file: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InvalidInputError(f"{path}: the tiers file is not UTF-8 text (byte {e.start})") from e
    return parse_tiers(text, str(path))


def tiers_toml(tiers: TierSet) -> str:
    """TOML text that parse_tiers reads as these tiers."""
    return "\n".join(
        f"[tiers.{tier.name}]\nttft_ms = {tier.ttft_ms!r}\ntpot_ms = {tier.tpot_ms!r}\nweight = {tier.weight!r}\n"
        for tier in tiers
    )


def _tier(name: str, table: object, text: str, source: str) -> Tier:
    if not isinstance(table, Mapping):
        raise InvalidInputError(f"{_place(source, text, name)}: tier {name!r} must be a table: write [tiers.{name}]")
    for key in table:
        if key not in _KNOWN:
            place = _place(source, text, name, key)
            raise InvalidInputError(f"{place}: tier {name!r}: unknown key {key!r}: use {', '.join(_KNOWN)}")
    for key in _REQUIRED:
        if key not in table:
            raise InvalidInputError(f"{_place(source, text, name)}: tier {name!r}: {key} is missing")
    # One key at a time, so that an error can point at its line.
    sound: dict[str, float] = {"ttft_ms": 1, "tpot_ms": 1}
    for key in (None, *table):
        try:
            Tier(name, **(sound | ({} if key is None else {key: table[key]})))
        except InvalidInputError as e:
            raise InvalidInputError(f"{_place(source, text, name, key)}: {e}") from e
    return Tier(name, **table)


def _place(source: str, text: str, name: str, key: str | None = None) -> str:
    """`source:line` of a table's header or of a key below it, as far as plain reading finds it; else source."""
    quoted = rf"[\"']?{re.escape(name)}[\"']?"
    header = re.compile(rf"\s*(\[\s*(tiers\s*\.\s*)?{quoted}\s*\]|(tiers\s*\.\s*)?{quoted}\s*[.=])")
    found = None
    for number, line in enumerate(text.splitlines(), 1):
        if found is None:
            found = number if header.match(line) else None
        elif line.lstrip().startswith("["):
            break
        if found is not None and key is not None and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{source}:{number}"
    return source if found is None else f"{source}:{found}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
