"""What the config files of the study and of the ladder have in common."""

import math
import pathlib
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from nitsum_jax.errors import InvalidInputError

T = TypeVar("T")
_SHOWN = 6  # names in a message


def read_config(path: str | pathlib.Path, folder: pathlib.Path, make: Callable[[Mapping[str, Any]], T]) -> T:
    """Reads a config file.

    Args:
      path: of a TOML file, or the name of one in the folder, without its ending.
      folder: of those that come with the package.
      make: of the file's entries.

    Raises:
      InvalidInputError: it cannot be read, or an entry is missing or wrong; the message names file and entry.
    """
    own = folder / f"{path}.toml"
    path = own if own.exists() else path
    try:
        values = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise InvalidInputError(f"{path}: cannot read the config: {e.strerror or e}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InvalidInputError(f"{path}: not valid TOML: {' '.join(str(e).split())}") from e
    try:
        return make(values)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        what = f"{e} is missing" if isinstance(e, KeyError) else " ".join(str(e).split())
        raise InvalidInputError(f"{path}: {what}") from e


def check_known(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses entries that would do nothing."""
    for key in values:
        if key not in known:
            raise InvalidInputError(f"unknown entry {key!r}: use {', '.join(sorted(known))}")


def check_positive(**values: object) -> None:
    """Refuses values that must be numbers above 0 and are not, alone or in a sequence, and empty sequences."""
    for name, value in values.items():
        numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        if not numbers:
            raise InvalidInputError(f"{name} is empty")
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise InvalidInputError(f"{name}={number!r} must be a number above 0")


def chosen_names(names: Sequence[str], part: str) -> set[str]:
    """Names that contain a part.

    Raises:
      InvalidInputError: none does.
    """
    chosen = {name for name in names if part in name}
    if not chosen:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise InvalidInputError(f"--only={part} is in no cell's name: there are {', '.join(names[:_SHOWN])}{more}")
    return chosen
