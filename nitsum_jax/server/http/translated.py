"""Other APIs whose requests are answered as chats.

What is wrong with a request is told by the names of their own fields; an answer is written part by part.
"""

import abc
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from nitsum_jax.runtime.streams.output import End, Piece
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.runtime.tools.parts import Part
from nitsum_jax.runtime.tools.reader import AnswerReader
from nitsum_jax.server.http.answering import Whole
from nitsum_jax.server.http.errors import ApiError, of_validation
from nitsum_jax.server.http.openai.plan import RequestPlan
from nitsum_jax.server.http.openai.requests import ChatRequest

_Result = TypeVar("_Result")


async def as_chat(
    body: Mapping[str, Any], names: Mapping[str, str], use: Callable[[ChatRequest], Awaitable[_Result]]
) -> _Result:
    """Reads the body of a chat request that stands for another one, and uses it.

    Args:
      body: of the chat.
      names: of fields of chats, and what they are called in the other API.
      use: of the request.

    Raises:
      ApiError: with the other API's names.
    """
    try:
        return await use(ChatRequest.model_validate(body))
    except (ValidationError, ApiError) as found:
        error = of_validation(found) if isinstance(found, ValidationError) else found
    field = (error.param or "").split("[")[0].split(".")[0]
    if field not in names:
        raise error
    param = names[field] + (error.param or "")[len(field) :]
    raise dataclasses.replace(error, param=param, message=error.message.replace(error.param or field, param))


class PartsWriter(abc.ABC):
    """Writes the one answer of a plan by its parts; see `WholeWriter` and `EventWriter`."""

    def __init__(self, plan: RequestPlan) -> None:
        """Begins the answer."""
        self._plan = plan
        self._reader = AnswerReader(None, thinks=False, thinking=False) if plan.reader is None else plan.reader()
        self._end: End | None = None

    def note(self, outputs: Outputs) -> None:
        """There is nothing to look at before the end."""
        del outputs

    def events(self, index: int, piece: Piece) -> str:
        """The events that bring a piece."""
        del index
        parts = self._reader.push(piece.text) + (self._reader.finish() if piece.end is not None else [])
        events = "".join([self._add(part) for part in parts])
        if piece.end is None:
            return events
        self._end = piece.end
        return events + self._close()

    def _take(self, wholes: Sequence[Whole]) -> None:
        """Takes the answer that is no stream."""
        (output,) = wholes
        self.events(0, Piece("".join(output.texts), (), output.told, output.end))

    @abc.abstractmethod
    def _add(self, part: Part) -> str:
        """The events that bring a part."""

    @abc.abstractmethod
    def _close(self) -> str:
        """The events that end what the last part belongs to."""
