"""What the command line tools share: absl flags of their own, and errors of one line."""

import math
import sys
import textwrap
from collections.abc import Sequence

from absl import flags

from nitsum_jax.errors import InvalidInputError, one_line

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130


class HelpRequested(Exception):  # noqa: N818  not an error
    """The user asked for help; the message is the help text."""


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str, *, others: bool = False) -> list[str]:
    """Parses the flags of a tool, which takes no other arguments; returns its name and what was not parsed.

    Each tool has `FlagValues` of its own rather than absl's global ones: several tools can then be imported in one
    process, and `--help` lists the flags of the tool and no others.

    Args:
      values: takes them.
      argv: the command line.
      usage: stands before the list of the flags.
      others: whether there may be more arguments, for somebody else to parse.

    Raises:
      HelpRequested: --help, -h or --helpfull is among the arguments.
      InvalidInputError: a flag is unknown or has a wrong value, or there is an argument that is no flag.
    """
    if any(argument.lstrip("-") in ("help", "helpfull", "h") and argument.startswith("-") for argument in argv[1:]):
        raise HelpRequested(f"{usage}\n\nflags:\n{_describe(values)}")
    try:
        rest: list[str] = values(list(argv), known_only=others)
    except flags.Error as error:
        raise InvalidInputError(f"{one_line(str(error))} (--help lists the flags)") from None
    if len(rest) > 1 and not others:
        raise InvalidInputError(f"unexpected argument {rest[1]!r}: everything is given by flags (--help lists them)")
    for name in values:
        value = values[name].value
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidInputError(f"--{name}={value} is not a finite number: give one")
    return rest


def ended(name: str, why: Exception) -> int:
    """Says why a tool ends without its work done, help or an error, and returns its exit status."""
    if isinstance(why, HelpRequested):
        out(str(why))
        return EXIT_OK
    err(f"{name}: {one_line(str(why))}")
    return EXIT_USAGE


def out(line: str) -> None:
    """Prints a line for the user, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def err(line: str) -> None:
    """Prints a line beside the output."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _describe(values: flags.FlagValues) -> str:
    lines = []
    for name in sorted(values):
        flag = values[name]
        # The help of an enum flag begins with its values, which serve as its type.
        kind, _, meaning = (flag.help or "").rpartition(">: ")
        kind = kind.removeprefix("<") or flag.flag_type()
        default = "" if flag.default in (None, "", []) else f" (default: {flag.default})"
        body = textwrap.fill(f"{one_line(meaning, 1000)} [{kind}]{default}", 110, break_on_hyphens=False)
        lines.append(f"  --{name}:\n{textwrap.indent(body, '      ')}")
    return "\n".join(lines)
