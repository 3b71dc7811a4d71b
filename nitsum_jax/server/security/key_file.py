"""The file of API keys, read again while the server runs."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable

from nitsum_jax.errors import InvalidInputError, one_line
from nitsum_jax.server.security.keys import KeyRing, read_keys

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class KeyChange:
    """What reading the file again came to: names of keys.

    Attributes:
      keys: how many are in force now.
      added: were not there before.
      removed: are valid no more.
      changed: have another secret, role or limit.
    """

    keys: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


class KeyFile:
    """A file and the keys that it had when it was last read and right; only the event loop uses it.

    Attributes:
      ring: for the guards, which see every change at once.
    """

    def __init__(self, path: str | pathlib.Path, tiers: Iterable[str]) -> None:
        """Reads the file.

        Args:
          path: of the file.
          tiers: those of the server, to find misspelt ones.

        Raises:
          InvalidInputError: the file cannot be read, or is wrong.
        """
        self._path = path
        self._tiers = tuple(tiers)
        self.ring = read_keys(path, self._tiers)

    def reload(self) -> KeyChange:
        """Puts in force what the file says now: from the next call on, nothing else is valid.

        Raises:
          InvalidInputError: the file cannot be read, or is wrong: the keys in force stay.  It has been logged.
        """
        try:
            new = read_keys(self._path, self._tiers)
        except InvalidInputError as error:
            _LOG.error("the API keys in force stay: %s", one_line(str(error)))
            raise
        change = _compared(self.ring, new)
        self.ring.replace(new)
        told = [
            f"{word} {', '.join(names)}"
            for word, names in (("added", change.added), ("removed", change.removed), ("changed", change.changed))
            if names
        ]
        # As a warning, so that the change of keys is visible at the default log level.
        _LOG.warning("API keys read again, %d in force: %s", change.keys, "; ".join(told) or "nothing changed")
        return change


def _compared(old: KeyRing, new: KeyRing) -> KeyChange:
    before, after = ({key.name: key for key in ring.keys} for ring in (old, new))
    return KeyChange(
        len(after),
        tuple(name for name in after if name not in before),
        tuple(name for name in before if name not in after),
        tuple(name for name, key in after.items() if name in before and key != before[name]),
    )
