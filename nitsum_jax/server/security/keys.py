"""API keys: the file that names them, and how a secret is recognised.

# keys.toml
[keys.alice]
hash = "sha256:9f86d0..."        # `nitsum-keys new` prints an entry
role = "user"                    # user (the default), monitor or admin
tiers = ["interactive"]          # all tiers if left out
requests_per_minute = 600        # no limit if left out
concurrent = 16                  # likewise

The file holds no secret: only the SHA-256 of each. That is enough for keys that are drawn at random with 256 bits, as
`nitsum-keys` does; a slow hash would protect only passwords that can be guessed, and would cost every call its time.
"""

import dataclasses
import enum
import hashlib
import hmac
import pathlib
import re
import secrets
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError

PREFIX = "nk_"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_KNOWN = ("hash", "role", "tiers", "requests_per_minute", "concurrent")


class KeyRole(enum.StrEnum):
    """What a key is for."""

    USER = "user"  # generates
    MONITOR = "monitor"  # reads metrics and dashboard, and nothing else
    ADMIN = "admin"  # all of it, and changes the cell


@dataclasses.dataclass(frozen=True, slots=True)
class ApiKey:
    """One key.

    Attributes:
      name: for logs and limits.
      digest: SHA-256 of the secret.
      role: what it may do.
      tiers: that its requests may name; None: all.
      requests_per_minute: None: no limit.
      concurrent: outputs at the same time; None: no limit.

    Raises:
      InvalidInputError: a value out of its range (on construction).
    """

    name: str
    digest: bytes
    role: KeyRole = KeyRole.USER
    tiers: tuple[str, ...] | None = None
    requests_per_minute: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidInputError(f"key name {self.name!r} is not valid: use 1 to 64 letters, digits and _ . -")
        for field in ("requests_per_minute", "concurrent"):
            value: object = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InvalidInputError(f"key {self.name!r}: {field}={value!r} must be a whole number above 0")


class KeyRing:
    """The keys of a server."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        """Takes the keys.

        Raises:
          InvalidInputError: there is none, or two have the same secret.
        """
        self.keys = tuple(keys)
        if not self.keys:
            raise InvalidInputError("no API keys: make one with nitsum-keys new")
        if len({key.digest for key in self.keys}) < len(self.keys):
            raise InvalidInputError("two API keys have the same hash: make a key of its own for each client")

    def replace(self, other: "KeyRing") -> None:
        """Has the keys of another ring from now on, and no others."""
        self.keys = other.keys

    def find(self, secret: str) -> ApiKey | None:
        """The key of this secret, in a time that depends neither on the secret nor on which key it is."""
        digest = digest_of(secret)
        found: ApiKey | None = None
        for key in self.keys:  # all of them, always
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def new_secret() -> str:
    """A fresh secret of 256 bits."""
    return PREFIX + secrets.token_urlsafe(32)


def entry(key: ApiKey) -> str:
    """The key as it stands in a file."""
    lines = [f"[keys.{_toml(key.name) if '.' in key.name else key.name}]", f'hash = "sha256:{key.digest.hex()}"']
    lines.append(f'role = "{key.role}"')
    if key.tiers is not None:
        lines.append(f"tiers = [{', '.join(map(_toml, key.tiers))}]")
    for field in ("requests_per_minute", "concurrent"):
        if getattr(key, field) is not None:
            lines.append(f"{field} = {getattr(key, field)}")
    return "\n".join(lines) + "\n"


def parse_keys(text: str, source: str, tiers: Iterable[str] | None = None) -> KeyRing:
    """Reads keys from TOML text.

    Args:
      text: tables `[keys.NAME]`.
      source: what error messages call the text.
      tiers: those of the server, to find misspelt ones; None: not checked.

    Raises:
      InvalidInputError: one line that begins with source, and the line number where one can be told.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(f"{source}: not valid TOML: {' '.join(str(error).split())}") from None
    unknown = next((key for key in document if key != "keys"), None)
    if unknown is not None:
        raise InvalidInputError(f"{source}: unknown entry {unknown!r}: only [keys.NAME] tables are allowed here")
    tables = document.get("keys")
    if not isinstance(tables, dict) or not tables:
        raise InvalidInputError(f"{source}: no keys: nitsum-keys new --file={source} adds one")
    known = None if tiers is None else tuple(tiers)
    keys = []
    for name, table in tables.items():
        try:
            keys.append(_key(name, table, known))
        except InvalidInputError as error:
            raise InvalidInputError(f"{_place(source, text, name)}: {error}") from None
    try:
        return KeyRing(keys)
    except InvalidInputError as error:
        raise InvalidInputError(f"{source}: {error}") from None


def read_keys(path: str | pathlib.Path, tiers: Iterable[str] | None = None) -> KeyRing:
    """Reads keys from a TOML file; see parse_keys.

    Raises:
      InvalidInputError: the file cannot be read, or parse_keys refuses it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot read the keys file: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{path}: the keys file is not UTF-8 text (byte {error.start})") from None
    return parse_keys(text, str(path), tiers)


def _key(name: str, table: object, known_tiers: tuple[str, ...] | None) -> ApiKey:
    if not isinstance(table, Mapping):
        raise InvalidInputError(f"key {name!r} must be a table: write [keys.{name}]")
    for field in table:
        if field not in _KNOWN:
            raise InvalidInputError(f"key {name!r}: unknown entry {field!r}: use {', '.join(_KNOWN)}")
    spelt = table.get("hash")
    match = _HASH.fullmatch(spelt) if isinstance(spelt, str) else None
    if match is None:
        raise InvalidInputError(f'key {name!r}: hash must be "sha256:" and 64 hex digits, as nitsum-keys new prints it')
    role = table.get("role", KeyRole.USER)
    if role not in tuple(KeyRole):
        raise InvalidInputError(f"key {name!r}: role={role!r} is not known: use {', '.join(KeyRole)}")
    return ApiKey(
        name,
        bytes.fromhex(match[1]),
        KeyRole(role),
        _tiers(name, table.get("tiers"), known_tiers),
        table.get("requests_per_minute"),
        table.get("concurrent"),
    )


def _tiers(name: str, value: Any, known: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value or not all(isinstance(tier, str) for tier in value):
        raise InvalidInputError(f'key {name!r}: tiers must be a list of names, such as ["interactive"]')
    for tier in value:
        if known is not None and tier not in known:
            raise InvalidInputError(f"key {name!r}: unknown tier {tier!r}: use {', '.join(known)}")
    return tuple(value)


def _place(source: str, text: str, name: str) -> str:
    header = re.compile(rf"\s*\[\s*keys\s*\.\s*[\"']?{re.escape(name)}[\"']?\s*\]")
    for number, line in enumerate(text.splitlines(), 1):
        if header.match(line):
            return f"{source}:{number}"
    return source


def _toml(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
