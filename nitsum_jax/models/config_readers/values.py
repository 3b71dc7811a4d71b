"""Helpers of what reads model configs: errors that name the key, numbers that are numbers."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from nitsum_jax.errors import InvalidInputError


@contextlib.contextmanager
def readable(where: str) -> Iterator[None]:
    """Turns what a value of the wrong type sets off into an error for the user."""
    try:
        yield
    except InvalidInputError:
        raise
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise InvalidInputError(
            f"{where} holds a value of the wrong kind ({error}); fetch or convert it again"
        ) from None


def unsupported(what: str, supported: str) -> InvalidInputError:
    """The error for something that the decoder does not implement."""
    return InvalidInputError(f"{what} is not supported; supported: {supported}")


def positive(value: Any, what: str) -> float:
    """`value` as a float.

    Raises:
      InvalidInputError: it is no positive finite number; `what` names the key.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidInputError(f"{what} is {shown(value)}, a value of the wrong kind: give a positive number")
    return float(value)


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def whole(config: Mapping[str, Any], key: str) -> int:
    """A whole number of a config.json.

    Raises:
      InvalidInputError: it is none.
    """
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInputError(f"config.json has {key}={shown(value)}; give a whole number")
    return value


def flag(config: Mapping[str, Any], key: str) -> bool:
    """True or false of a config.json.

    Raises:
      InvalidInputError: it is neither.
    """
    value = config[key]
    if not isinstance(value, bool):
        raise InvalidInputError(f"config.json has {key}={shown(value)}; give true or false")
    return value


def says_nothing(value: Any) -> bool:
    """Whether a value of an unknown key switches nothing on: null, false, 0, or empty."""
    return value is None or (isinstance(value, bool | int | float | str | list | Mapping) and not value)
