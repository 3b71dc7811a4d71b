"""The parts of an answer, as they come."""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Thought:
    """Text that the model wrote for itself."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool is called; its arguments follow.

    Attributes:
      index: of the call in the answer, from 0.
      name: of the tool.
    """

    index: int
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call, in JSON."""

    index: int
    text: str


@dataclasses.dataclass(slots=True)
class Answer:
    """A whole answer.

    Attributes:
      text: for the user.
      thought: before it.
      calls: name and arguments of each call.
    """

    text: str = ""
    thought: str = ""
    calls: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, parts: Iterable["Part"]) -> "Answer":
        """Puts parts together."""
        answer = cls()
        for part in parts:
            match part:
                case Said(text):
                    answer.text += text
                case Thought(text):
                    answer.thought += text
                case CallBegun(_, name):
                    answer.calls.append((name, ""))
                case CallArguments(index, text):
                    name, before = answer.calls[index]
                    answer.calls[index] = (name, before + text)
        answer.thought = answer.thought.strip()
        return answer


Part = Said | Thought | CallBegun | CallArguments
