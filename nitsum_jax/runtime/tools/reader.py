"""From the text of an answer to its parts, while it comes."""

from collections.abc import Callable, Sequence

from nitsum_jax.runtime.tools.formats import ARGS, BEGIN, CALL_ID, END, THINK, THOUGHT, ToolFormat
from nitsum_jax.runtime.tools.json_call import JsonCall, NotACallError, ValueReader
from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part, Said, Thought

_LONGEST_NAME = 256


class AnswerReader:
    """Takes one answer apart; text that may begin a tag is held back until more decides it.

    Attributes:
      calls: calls that have begun.
    """

    def __init__(self, form: ToolFormat | None, tools: Sequence[str] = (), *, thinks: bool, thinking: bool) -> None:
        """Begins an answer.

        Args:
          form: in which calls are written; None: there are none.
          tools: names of the tools.
          thinks: whether thoughts stand in <think> tags at the beginning.
          thinking: whether the prompt has begun a thought.
        """
        self.calls = 0
        self._form = form
        self._tools = tuple(tools)
        self._held = ""
        self._spaces = ""  # behind text: only said where more text follows
        self._call: JsonCall | None = None
        self._raw = ""  # of a call that may turn out to be none
        self._value = ValueReader()
        self._state: Callable[[], list[Part] | None] = self._start
        if thinking:
            self._state = self._thought
        elif not thinks:
            self._state = self._first if form is ToolFormat.LLAMA3 else self._text

    def push(self, text: str) -> list[Part]:
        """Takes more text; returns the parts that are certain."""
        self._held += text
        parts: list[Part] = []
        while (new := self._state()) is not None:
            parts += new
        return _merged(parts)

    def finish(self) -> list[Part]:
        """The rest, when no more will come."""
        rest, self._held = self._held, ""
        if self._state == self._thought:
            return [Thought(rest)] if rest else []
        if self._state in (self._text, self._start, self._first):
            return [Said(self._spaces + rest)] if rest else []
        if self._state == self._object and self._call is not None and self._call.name is None and self._raw:
            return [Said(self._raw)]
        return []

    # Each state takes what it can of the held text, and returns its parts; None where it needs more text.

    def _start(self) -> list[Part] | None:
        text = self._held.lstrip()
        if _undecided(text, THINK):
            return None
        if text.startswith(THINK):
            self._held = text[len(THINK) :]
            self._state = self._thought
        else:
            self._state = self._first if self._form is ToolFormat.LLAMA3 else self._text
        return []

    def _thought(self) -> list[Part] | None:
        before, found, behind = self._held.partition(THOUGHT)
        if found:
            self._held = behind.lstrip() if behind else ""
            self._state = self._behind_thought
            return [Thought(before)] if before else []
        ready = len(before) - _overlap(before, THOUGHT)
        self._held = before[ready:]
        return [Thought(before[:ready])] if ready else None

    def _behind_thought(self) -> list[Part] | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        self._state = self._first if self._form is ToolFormat.LLAMA3 else self._text
        return []

    def _text(self) -> list[Part] | None:
        if self._form is None:
            said, self._held = self._held, ""
            return [Said(said)] if said else None
        tag = BEGIN[self._form]
        before, found, behind = self._held.partition(tag)
        if not found:
            ready = len(before) - _overlap(before, tag)
            before, self._held = before[:ready], before[ready:]
            return self._say(before) if before else None
        parts = self._say(before)
        self._held, self._spaces = behind, ""
        self._state = self._opened
        return parts

    def _say(self, text: str) -> list[Part]:
        """Text without the spaces at its end, which wait: before a call they mean nothing."""
        text = self._spaces + text
        ready = text.rstrip()
        self._spaces = text[len(ready) :]
        return [Said(ready)] if ready else []

    def _first(self) -> list[Part] | None:
        """Llama 3: a call is the whole answer, so it begins with it."""
        tag = BEGIN[ToolFormat.LLAMA3]
        text = self._held.lstrip()
        if _undecided(text, tag):
            return None
        if text.startswith(tag):
            self._held = text[len(tag) :]
            self._state = self._opened
        elif text.startswith("{"):
            self._held = text
            self._state = self._opened
        else:
            self._state = self._text
        return []

    def _opened(self) -> list[Part] | None:
        self._held = self._held.lstrip()
        if not self._held:
            return None
        if self._form in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS):
            if self._held.startswith("["):
                self._held = self._held[1:]
                self._begin_object()
                return []
            self._state = self._named
            return []
        self._begin_object()
        return []

    def _begin_object(self) -> None:
        known = self._tools if self._form is ToolFormat.LLAMA3 else None
        self._call, self._raw = JsonCall(self.calls, known), ""
        self._state = self._object

    def _object(self) -> list[Part] | None:
        call, text = self._call, self._held
        assert call is not None
        if not text:
            return None
        try:
            parts, behind = call.push(text)
        except NotACallError:
            self._held = self._raw + text
            self._state = self._rest
            return []
        self._raw += text
        self._held = behind
        self.calls += sum(isinstance(part, CallBegun) for part in parts)
        if call.ended:
            self._state = self._rest if call.broken else self._closed
        return parts

    def _rest(self) -> list[Part] | None:
        """What looked like a call is text, or what comes behind one that broke off."""
        said, self._held = self._held, ""
        return [Said(said)] if said else None

    def _closed(self) -> list[Part] | None:
        """Behind a call: what closes it, and perhaps the next one."""
        self._held = self._held.lstrip()
        if not self._held:
            return None
        if self._form is ToolFormat.HERMES:
            if _undecided(self._held, END):
                return None
            self._held = self._held.removeprefix(END)
            self._state = self._text
            return []
        if self._held[0] in ",;":
            self._held = self._held[1:].lstrip()
            self._begin_object()
            return []
        if self._held[0] == "{":
            self._begin_object()
            return []
        self._held = self._held.removeprefix("]")
        self._state = self._text
        return []

    def _named(self) -> list[Part] | None:
        """Mistral: the name stands before the arguments."""
        at = self._held.find("{")
        if at < 0:
            if len(self._held) > _LONGEST_NAME:
                self._state = self._rest
                return []
            return None
        name = self._held[:at].split(ARGS)[0].split(CALL_ID)[0].strip()
        self._held = self._held[at:]
        self._value = ValueReader()
        self._state = self._bare_arguments
        self.calls += 1
        return [CallBegun(self.calls - 1, name)]

    def _bare_arguments(self) -> list[Part] | None:
        if not self._held:
            return None
        count = 0
        for char in self._held:
            if not self._value.takes(char):
                break
            count += 1
        text, self._held = self._held[:count], self._held[count:]
        if self._value.ended:
            self._state = self._text
        return [CallArguments(self.calls - 1, text)] if text else []


def _undecided(text: str, tag: str) -> bool:
    """Whether a text may still begin with a tag, and does not yet."""
    return len(text) < len(tag) and tag.startswith(text)


def _overlap(text: str, tag: str) -> int:
    """The longest end of a text that begins a tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Neighbours of one kind as one."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, Said) and isinstance(last, Said):
            merged[-1] = Said(last.text + part.text)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            merged[-1] = Thought(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            merged[-1] = CallArguments(last.index, last.text + part.text)
        else:
            merged.append(part)
    return merged
