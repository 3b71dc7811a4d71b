"""A line on stderr while somebody waits for compiling: within two seconds, and again at least every five."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import parse_layout

TICK_S = 0.5
"""How often to look for news."""

_ANEW = "\r\x1b[K"  # to the start of the line, and all of it away
_FIRST_S = 1.0
_PLAIN_EVERY_S = 4.0


class MakingNews(Protocol):
    """An executable in the making, as the engine or GetLayout reports it."""

    # ruff: noqa: D102
    @property
    def activity(self) -> str: ...
    @property
    def tp(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def seconds(self) -> float: ...


class LayoutNews(Protocol):
    """A layout that is waited for, likewise."""

    @property
    def layout(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def needed(self) -> int: ...
    @property
    def ready(self) -> int: ...


class CompileNews(Protocol):
    """What is compiled now, likewise."""

    @property
    def making(self) -> Sequence[MakingNews]: ...
    @property
    def layouts(self) -> Sequence[LayoutNews]: ...


class ProgressLine:
    """Where progress is told: one line that is rewritten on a terminal, else line after line."""

    def __init__(self, name: str, *, rewritten: bool | None = None, say: Callable[[str], None] | None = None) -> None:
        """Says nothing yet.

        Args:
          name: of the tool, in front of every line.
          rewritten: whether there is one line only; None: if stderr is a terminal.
          say: takes the lines where they are not rewritten; None: stderr.
        """
        self._name = name
        self.rewritten = sys.stderr.isatty() if rewritten is None else rewritten
        self._say = say
        self._there = False

    def tell(self, text: str) -> None:
        """Shows a text; it replaces the one before, if that can be."""
        line = f"{self._name}: {text}"
        if not self.rewritten:
            if self._say is None:
                _write(f"{line}\n")
            else:
                self._say(line)
            return
        width = max(2, shutil.get_terminal_size().columns - 1)
        _write(_ANEW + (line if len(line) <= width else line[: width - 1] + "…"))
        self._there = True

    def clear(self) -> None:
        """Takes the line away, so that other output can follow."""
        if self._there:
            _write(_ANEW)
            self._there = False


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


class Waiting:
    """Decides when the line says something while a call is waited for: what is quick is not told."""

    def __init__(
        self,
        what: str,
        line: ProgressLine,
        *,
        now: Callable[[], float] = time.monotonic,
        plain_every_s: float = _PLAIN_EVERY_S,
    ) -> None:
        """The wait begins now.

        Args:
          what: is waited for, in words, such as "compiling tp4".
          line: takes the texts.
          now: seconds, of any origin.
          plain_every_s: between two lines where they are not rewritten.
        """
        self._what = what
        self._line = line
        self._now = now
        self._begin = now()
        self._due = self._begin + _FIRST_S
        self._every_s = TICK_S if line.rewritten else plain_every_s

    def show(self, news: str = "") -> None:
        """Tells how long it has taken and the news, if a line is due; to be called every `TICK_S`."""
        now = self._now()
        if now >= self._due:
            self._line.tell(f"{self._what} for {duration(now - self._begin)}" + (f": {news}" if news else ""))
            self._due = now + self._every_s


def told(news: CompileNews, layout: str, devices: int) -> str:
    """One line about what is compiled, "" if nothing is.

    Args:
      news: from the engine or GetLayout.
      layout: that is waited for, as the user wrote it; the engine has a form of its own.
      devices: of the cell.
    """
    try:
        layout = str(parse_layout(layout, devices).without_tiers())  # whom it is kept for is not compiled
    except NitsumError:
        return ""  # the call that is waited for says what is wrong
    return _in_words(news, [one for one in news.layouts if one.layout == layout][:1])


def _in_words(news: CompileNews, layouts: Sequence[LayoutNews]) -> str:
    parts = []
    for one in layouts:
        if one.stage == "compiling":
            parts.append(f"{one.ready} of {one.needed} executables ready")
        else:
            parts.append(f"all {one.needed} executables ready, switching")
    for making in news.making:
        parts.append(
            f"{making.activity} {making.phase} of {making.size} at TP {making.tp} for {duration(making.seconds)}"
        )
    return ", ".join(parts)


class StartProgress:
    """Tells on a line how far the start of an engine is; `start_engine` calls it."""

    def __init__(
        self,
        line: ProgressLine,
        *,
        now: Callable[[], float] = time.monotonic,
        plain_every_s: float = _PLAIN_EVERY_S,
    ) -> None:
        """As `Waiting`; the wait begins with the first news."""
        self._line = line
        self._now = now
        self._every_s = plain_every_s
        self._waiting: Waiting | None = None

    def __call__(self, news: CompileNews) -> None:
        """Takes the news of a start."""
        if self._waiting is None:
            self._waiting = Waiting("compiling", self._line, now=self._now, plain_every_s=self._every_s)
        self._waiting.show(_in_words(news, news.layouts[:1]))


def duration(seconds: float) -> str:
    """A time for people: 41 s, 2 min 5 s."""
    whole = int(seconds)
    return f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"
