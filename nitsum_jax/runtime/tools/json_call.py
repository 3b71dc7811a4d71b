"""One call of a tool, read while it is written: an object of JSON with a name and arguments."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part

_ARGUMENTS = ("arguments", "parameters")
_FOLLOWS = {
    ("start", "{"): "member",
    ("member", '"'): "key",
    ("member", "}"): "end",
    ("colon", ":"): "value",
    ("next", ","): "member",
    ("next", "}"): "end",
}


class NotACallError(Exception):
    """What was read cannot be a call."""


class ValueReader:
    """Finds the end of one value of JSON, character by character; it does not check the inside."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.begun = self.ended = False

    def takes(self, char: str) -> bool:
        """Whether a character belongs to the value; what follows a number or a word does not."""
        if self.ended:
            return False
        if self._in_string:
            self._in_string = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
            self.ended = not self._in_string and not self._depth
            return True
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            if not self._depth:
                self.ended = True
                return False
            self._depth -= 1
            self.ended = not self._depth
        elif char == '"':
            self._in_string = True
        elif not self._depth and (char == "," or (self.begun and char.isspace())):
            self.ended = True
            return False
        self.begun = self.begun or not char.isspace()
        return True


class JsonCall:
    """Reads `{"name": ..., "arguments": {...}}`; other keys are passed over.

    Attributes:
      ended: whether the object is complete, or broken.
      broken: whether it ended as no object, behind the name of the tool: what was told of the call stays.
      name: of the tool, once it is known.
    """

    def __init__(self, index: int, known: Sequence[str] | None = None) -> None:
        """Begins before the object.

        Args:
          index: of the call.
          known: names that a call may have; None: any.
        """
        self.ended = self.broken = False
        self.name: str | None = None
        self._index = index
        self._known = known
        self._key: str | None = None
        self._state = "start"
        self._value = ValueReader()
        self._text = ""
        self._early = ""
        self._told = self._arguments_came = False
        self._streams = False  # whether the value is handed out as it comes

    def push(self, text: str) -> tuple[list[Part], str]:
        """Takes more text.

        Returns:
          (new parts, what is behind the end of the object).

        Raises:
          NotACallError: this is no call; nothing was told of it.
        """
        parts: list[Part] = []
        streamed = ""
        for at, char in enumerate(text):
            if self.ended:
                self._flush(parts, streamed)
                return parts, text[at:]
            try:
                streamed += self._take(char)
            except NotACallError:
                if self.name is None:
                    raise
                self.ended = self.broken = True
                self._flush(parts, streamed)
                return parts, text[at:]
        self._flush(parts, streamed)
        return parts, ""

    def _flush(self, parts: list[Part], streamed: str) -> None:
        self._early += streamed
        if self.name is None:
            if self.ended:
                raise NotACallError
            return
        if not self._told:
            self._told = True
            parts.append(CallBegun(self._index, self.name))
        if self._early:
            parts.append(CallArguments(self._index, self._early))
            self._arguments_came = True
            self._early = ""
        elif self.ended and not self._arguments_came:
            parts.append(CallArguments(self._index, "{}"))
            self._arguments_came = True

    def _take(self, char: str) -> str:
        """One character; returns what of it is to be streamed."""
        match self._state:
            case "value":
                return self._take_of_value(char)
            case "key":
                self._value.takes(char)
                self._text += char
                if self._value.ended:
                    self._key, self._text, self._state = _parsed(self._text), "", "colon"
            case "start" | "member" | "colon" | "next":
                self._between(char)
        return ""

    def _take_of_value(self, char: str) -> str:
        begins = not self._value.begun
        if not self._value.takes(char):
            rest = self._end_value()
            self._between(char)
            return rest
        if not self._value.begun:
            return ""  # a space before it
        if begins:
            self._streams = self._key in _ARGUMENTS and char != '"'
        if self._streams:
            if self._value.ended:
                self._state = "next"
            return char
        self._text += char
        return self._end_value() if self._value.ended else ""

    def _between(self, char: str) -> None:
        if char.isspace():
            return
        follows = _FOLLOWS.get((self._state, char))
        if follows is None:
            raise NotACallError
        self._state = follows
        self.ended = follows == "end"
        self._value = ValueReader()
        if follows == "key":
            self._value.takes(char)
            self._text = char

    def _end_value(self) -> str:
        """A value is complete; returns what is to be streamed of arguments that came as a text."""
        text, key = self._text, self._key
        self._text, self._state, self._streams = "", "next", False
        if not text:
            return ""
        value = _parsed(text)
        if key == "name":
            if not isinstance(value, str) or (self._known is not None and value not in self._known):
                raise NotACallError
            self.name = value
        elif key in _ARGUMENTS:
            return value if isinstance(value, str) else text
        return ""


def _parsed(text: str) -> Any:
    try:
        return from_json(text)  # which has an end of depth, unlike json.loads
    except ValueError:
        raise NotACallError from None
