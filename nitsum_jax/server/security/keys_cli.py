"""nitsum-keys: makes API keys for nitsum-serve --api_keys."""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from nitsum_jax.errors import InvalidInputError, NitsumError, PreconditionError
from nitsum_jax.server import cli
from nitsum_jax.server.security.keys import ApiKey, KeyRole, digest_of, entry, new_secret, parse_keys, read_keys

_NAME = "nitsum-keys"
USAGE = """nitsum-keys makes API keys for nitsum-serve --api_keys=FILE.

  nitsum-keys new --name=alice --tiers=interactive,standard --requests_per_minute=600 --file=keys.toml
  nitsum-keys list --file=keys.toml

new prints the key, once, on standard output: give it to the client. The file gets its SHA-256 only; without --file the
entry is printed on standard error. Exit status: 0 done; 2 wrong flags, or a file that is not right."""


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv))


def main(argv: Sequence[str]) -> int:
    """Runs the tool and returns its exit status."""
    try:
        values = _define()
        command = argv[1] if len(argv) > 1 else "--help"
        if command.startswith("-"):
            cli.parse(values, [_NAME, command], USAGE)
            raise InvalidInputError("the command is missing: use nitsum-keys new, or nitsum-keys list")
        cli.parse(values, [_NAME, *argv[2:]], USAGE)
        if command == "new":
            _new(values)
        elif command == "list":
            _list(values)
        else:
            raise InvalidInputError(f"unknown command {command!r}: use new or list")
    except (cli.HelpRequested, NitsumError) as why:
        return cli.ended(_NAME, why)
    return cli.EXIT_OK


def _define() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("name", None, "name of the key, for logs and messages", flag_values=values)
    flags.DEFINE_enum("role", "user", list(KeyRole), "what it may do", flag_values=values)
    flags.DEFINE_list("tiers", None, "tiers that its requests may name; all if not given", flag_values=values)
    flags.DEFINE_integer("requests_per_minute", None, "limit; none if not given", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "concurrent", None, "outputs at the same time; any number if not given", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string("file", None, "the keys file: the entry is added to it", flag_values=values)
    return values


def _new(values: flags.FlagValues) -> None:
    if not values.name:
        raise InvalidInputError("--name is missing: name the owner of the key")
    secret = new_secret()
    tiers = tuple(values.tiers) if values.tiers else None
    key = ApiKey(
        values.name, digest_of(secret), KeyRole(values.role), tiers, values.requests_per_minute, values.concurrent
    )
    if values.file is None:
        cli.err(entry(key).rstrip())
    else:
        _append(pathlib.Path(values.file), key)
        cli.err(f"added to {values.file}; the key follows, and is stored nowhere:")
    cli.out(secret)


def _append(path: pathlib.Path, key: ApiKey) -> None:
    old = ""
    if path.exists():
        try:
            old = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise InvalidInputError(f"{path}: cannot read the keys file") from None
        if old.strip() and key.name in {known.name for known in parse_keys(old, str(path)).keys}:
            raise PreconditionError(f"{path} has a key named {key.name!r} already: choose another --name")
    new = old + ("\n" if old.strip() else "") + entry(key)
    parse_keys(new, str(path))
    # Whole or not at all: a server may read the file at any time. Only its owner needs to read it.
    beside = path.with_name(path.name + ".new")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(new)
        os.replace(beside, path)
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot write the keys file: {error.strerror or error}") from None


def _list(values: flags.FlagValues) -> None:
    if not values.file:
        raise InvalidInputError("--file is missing: name the keys file")
    for key in read_keys(values.file).keys:
        tiers = "all tiers" if key.tiers is None else ", ".join(key.tiers)
        rate = "any rate" if key.requests_per_minute is None else f"{key.requests_per_minute} requests a minute"
        concurrent = "any number at once" if key.concurrent is None else f"{key.concurrent} at once"
        cli.out(f"{key.name}: {key.role}, {tiers}, {rate}, {concurrent}")


if __name__ == "__main__":
    run()
