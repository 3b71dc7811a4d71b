"""The answer to one prompt of a call of the Python API, while it comes and when it is whole."""

import dataclasses
import time
from collections.abc import Callable

from nitsum_jax.engine.request import FinishReason, TokenDelta, TokenLogprob
from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.local.asked import AskedPrompt
from nitsum_jax.runtime.streams.output import Output, Piece
from nitsum_jax.runtime.tools.parts import Answer, Said


@dataclasses.dataclass(frozen=True, slots=True)
class FunctionCall:
    """A tool that the model wants to have called.

    Attributes:
      name: of the function.
      arguments: an object, in JSON.
    """

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """The output of one prompt.

    Attributes:
      text: text of the output; without thoughts and calls of tools, where there are some.
      token_ids: its token ids, including those that spelled a stop string, without a stop token.
      finish_reason: STOP or LENGTH.
      prompt_tokens: number of tokens of the prompt.
      cached_tokens: how many of them were in the prefix cache, so that they were not computed again.
      seed: the seed of the request, which gives the same output again.
      logprobs: one for each token whose text is in the output, if they were asked for.
      prompt_logprobs: one for each token of the prompt behind its first, if they were asked for.
      ttft_ms: time from the request to its first token, milliseconds; None if there is none.
      tpot_ms: time per token after the first, milliseconds; None if there are fewer than two.
      stop: the stop text that ended it, if one did.
      tool_calls: the tools that the answer of a chat calls.
      reasoning: what the model thought before the answer of a chat.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int
    logprobs: tuple[TokenLogprob, ...] = ()
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    stop: str | None = None
    tool_calls: tuple[FunctionCall, ...] = ()
    reasoning: str = ""


class PromptJob:
    """One prompt of a call, and what has come of it."""

    def __init__(self, asked: AskedPrompt, model: ServedModel, cancel: Callable[[str], None]):
        """Has not begun.

        Args:
          asked: what is asked for.
          model: that answers.
          cancel: ends a request in the engine.
        """
        self.call = asked.call
        self.id = asked.call.request.id
        self._model = model
        self._cancel = cancel
        self._reader = None if asked.reader is None else asked.reader()
        self.output: Output | None = None
        self._pieces: list[Piece] = []

    def begin(self) -> None:
        """Its time begins to count."""
        stream = self._model.tokenizer.stream(self.call.skip_special, self.call.shown)
        self.output = Output(self.call, stream, self._cancel, time.monotonic())

    def take(self, delta: TokenDelta) -> Piece:
        """The next piece."""
        assert self.output is not None
        piece = self.output.take([delta])
        if self._reader is not None:
            parts = self._reader.push(piece.text)
            if piece.end is not None:
                parts += self._reader.finish()
            said = "".join(part.text for part in parts if isinstance(part, Said))
            piece = dataclasses.replace(piece, text=said, parts=parts)
        self._pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        """All of it, when it has ended."""
        assert self.output is not None
        end, seed = self._pieces[-1].end, self.call.request.sampling.seed
        assert end is not None
        assert seed is not None
        answer = Answer.of(part for piece in self._pieces for part in piece.parts)
        return Completion(
            text="".join(piece.text for piece in self._pieces),
            token_ids=tuple(token for piece in self._pieces for token in piece.ids),
            finish_reason=end.reason,
            prompt_tokens=len(self.call.prompt_ids),
            seed=seed,
            logprobs=tuple(told.logprob for piece in self._pieces for told in piece.told),
            ttft_ms=self.output.times.ttft_ms,
            tpot_ms=self.output.times.tpot_ms,
            cached_tokens=self.output.cached_tokens,
            prompt_logprobs=tuple(self.output.prompt_logprobs),
            stop=end.stop,
            tool_calls=tuple(FunctionCall(name, arguments) for name, arguments in answer.calls),
            reasoning=answer.thought,
        )
