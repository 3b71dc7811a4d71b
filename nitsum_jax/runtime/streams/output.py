"""The output of one request on its way to the client: text, tokens, times and how it ended."""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from nitsum_jax.engine.request import FinishReason, TokenDelta, TokenLogprob
from nitsum_jax.errors import UnavailableError
from nitsum_jax.runtime.backend import TextStream
from nitsum_jax.runtime.calls import Call
from nitsum_jax.runtime.errors import DeadlineError, GenerationError
from nitsum_jax.runtime.streams.stops import StopMatcher
from nitsum_jax.runtime.tools.parts import Part

Vectors: TypeAlias = np.ndarray
"""f32[texts, D]."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenWithLogprob:
    """A token with how likely it was.

    Attributes:
      id: token id.
      logprob: of the token, and of others at its place.
      start: where its text begins in the output, in characters.
    """

    id: int
    logprob: TokenLogprob
    start: int


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """How an output ended: by STOP or LENGTH, and by which stop string, if by one."""

    reason: FinishReason
    stop: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """What is new in an output.

    Attributes:
      text: new text that is certain; it lags behind the ids while a character is incomplete or a stop string may have
        begun.
      ids: new token ids.
      told: tokens with their log probabilities, if these were asked for; they come together with their text.
      end: how the output ended; None while more is to come.
      parts: of the answer of a chat that may have thoughts or call tools: what is new of these and of its text, which
        then is all that stands in `text`.
    """

    text: str
    ids: Sequence[int]
    told: Sequence[TokenWithLogprob] = ()
    end: End | None = None
    parts: Sequence[Part] = ()


class Output:
    """Makes pieces of the deltas of one call."""

    def __init__(self, call: Call, text_stream: TextStream, cancel: Callable[[str], None], arrival_s: float) -> None:
        """Begins an output.

        Args:
          call: whose output this is.
          text_stream: the tokenizer's decoder for it.
          cancel: called with the id of the request when a stop string has ended it, while the engine would go on.
          arrival_s: of the request, on the engine's monotonic clock.
        """
        self._call = call
        self._text = OutputText(text_stream, call.stops, call.request.min_tokens, call.include_stop)
        self._cancel = cancel
        self._waiting: deque[TokenWithLogprob] | None = None if call.request.logprobs is None else deque()
        self._given = len(call.request.forced_ids)
        self.times = OutputTimes(arrival_s)
        self.prompt_logprobs: list[TokenLogprob] = []
        """Of the tokens of the prompt behind its first, if it is scored, as soon as there is a piece."""
        self.cached_tokens = 0
        """Tokens of the prompt that the prefix cache had, as soon as there is a piece."""
        self.embedding: np.ndarray | None = None
        """f32[D], of the prompt, if it was asked for, with the last piece."""

    def take(self, deltas: Sequence[TokenDelta]) -> Piece:
        """The next piece; none may be asked for after one with an end.

        Raises:
          DeadlineError: the deadline of the request passed.
          GenerationError: the engine failed on the request.
          UnavailableError: the server stopped before the output was complete.
        """
        ids: list[int] = []
        text = ""
        for whole in deltas:
            delta = self._behind_prompt(whole) if self._given or self._call.silent else whole
            self.cached_tokens = delta.cached_tokens
            self.embedding = delta.embedding
            taken, piece = self._push(delta)
            self.times.add(len(taken), delta.time_s)
            ids += taken
            text += piece
            if self._text.stopped_by is not None:
                self._cancel(self._call.request.id)  # now, not when the client has read the rest
                return Piece(text, ids, self._told(), End(FinishReason.STOP, self._text.stopped_by))
            reason = _checked(delta)
            if reason is not None:
                text += self._text.finish()
                stop = self._text.stopped_by
                ended = End(reason if stop is None else FinishReason.STOP, stop)
                return Piece(text, ids, self._told(whole=stop is None), ended)
        return Piece(text, ids, self._told())

    def _behind_prompt(self, delta: TokenDelta) -> TokenDelta:
        """A delta without the tokens that belong to the prompt, and without any if none is wanted."""
        count = min(self._given, len(delta.token_ids))
        self._given -= count
        self.prompt_logprobs += delta.logprobs[:count]
        keep = slice(0, 0) if self._call.silent else slice(count, None)
        ended = delta.finish_reason
        if self._call.silent and ended is FinishReason.STOP:
            ended = FinishReason.LENGTH
        return dataclasses.replace(
            delta, token_ids=delta.token_ids[keep], logprobs=delta.logprobs[keep], finish_reason=ended
        )

    def _push(self, delta: TokenDelta) -> tuple[Sequence[int], str]:
        if self._waiting is None:
            return self._text.push(delta.token_ids)
        text = ""
        for index, (token, logprob) in enumerate(zip(delta.token_ids, delta.logprobs, strict=True)):
            self._waiting.append(TokenWithLogprob(token, logprob, self._text.decoded))
            text += self._text.push((token,))[1]
            if self._text.stopped_by is not None:
                return delta.token_ids[: index + 1], text
        return delta.token_ids, text

    def _told(self, whole: bool = False) -> Sequence[TokenWithLogprob]:
        """Tokens whose text has begun to be shown, or all of them if the output is whole."""
        if not self._waiting:
            return ()
        told = []
        while self._waiting and (whole or self._waiting[0].start < self._text.shown):
            told.append(self._waiting.popleft())
        return told


def vectors_of(outputs: Sequence[Output], width: int) -> Vectors:
    """The embeddings of the prompts of outputs that have ended; D is `width`."""
    return np.array([output.embedding for output in outputs], np.float32).reshape(len(outputs), width)


class OutputText:
    """Turns token ids into text that may be shown, and ends the output at a stop string.

    Attributes:
      decoded: characters that the tokens have said so far.
      shown: characters of them that were handed out.
    """

    def __init__(
        self, text_stream: TextStream, stops: Sequence[str], min_tokens: int = 0, include_stop: bool = False
    ) -> None:
        """Begins a text.

        Args:
          text_stream: decoder of its tokens.
          stops: before the first of them that it would contain, the text ends.
          min_tokens: text of so many first tokens is not searched for them.
          include_stop: the text ends with the string that ended it.
        """
        self._text_stream = text_stream
        self._matcher = StopMatcher(stops)
        self._one_by_one = bool(stops)
        self._unsearched = min_tokens
        self._include_stop = include_stop
        self.decoded = 0
        self.shown = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return self._matcher.matched

    def push(self, ids: Sequence[int]) -> tuple[Sequence[int], str]:
        """Takes new ids and returns those that belong to the output, and the text that is ready.

        The ids that spell a stop string belong to the output (they have been streamed before anyone could know);
        those after it do not.
        """
        if not self._one_by_one:
            return ids, self._show(self._decode(ids))
        text = ""
        for index, token in enumerate(ids):
            piece = self._decode((token,))
            if self._unsearched > 0:
                self._unsearched -= 1
                text += piece
                continue
            text += self._searched(piece)
            if self.stopped_by is not None:
                return ids[: index + 1], self._show(text)
        return ids, self._show(text)

    def finish(self) -> str:
        """The rest of the text, when no more ids will come."""
        rest = self._text_stream.flush()
        self.decoded += len(rest)
        return self._show(rest if self._unsearched > 0 else self._searched(rest) + self._matcher.flush())

    def _searched(self, text: str) -> str:
        ready = self._matcher.push(text)
        stop = self._matcher.matched
        return ready if stop is None or not self._include_stop else ready + stop

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._text_stream.push(ids)
        self.decoded += len(text)
        return text

    def _show(self, text: str) -> str:
        self.shown += len(text)
        return text


class OutputTimes:
    """First and last token time of one output, on the clock of the engine (seconds)."""

    def __init__(self, arrival_s: float) -> None:
        self._arrival_s = arrival_s
        self._first_s = 0.0
        self._last_s = 0.0
        self.tokens = 0

    def add(self, tokens: int, time_s: float) -> None:
        """Notes that so many tokens came at this time."""
        if not tokens:
            return
        if not self.tokens:
            self._first_s = time_s
        self._last_s = time_s
        self.tokens += tokens

    @property
    def ttft_ms(self) -> float | None:
        """Arrival to first token in milliseconds; None while there is none."""
        return (self._first_s - self._arrival_s) * 1e3 if self.tokens else None

    @property
    def tpot_ms(self) -> float | None:
        """(last token time - first token time) / (tokens - 1) in milliseconds; None below two tokens."""
        return (self._last_s - self._first_s) * 1e3 / (self.tokens - 1) if self.tokens > 1 else None


def _checked(delta: TokenDelta) -> FinishReason | None:
    """The finish reason of a delta, if it is one that a client asked for; the others end the call with an error."""
    match delta.finish_reason:
        case FinishReason.DEADLINE:
            raise DeadlineError("the deadline of the call passed before the output was complete")
        case FinishReason.CANCELLED:  # a cancelled handler is not here any more, so it was not the client
            raise UnavailableError("the server stopped before the output was complete: send the request again")
        case FinishReason.ERROR:
            raise GenerationError(delta.error or "the engine failed on this request")
        case reason:
            return reason
