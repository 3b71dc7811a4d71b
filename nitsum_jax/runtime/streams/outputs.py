"""All outputs of one call that asks for several, as they grow."""

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np

from nitsum_jax.engine.request import TokenLogprob
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import Call
from nitsum_jax.runtime.errors import GenerationError
from nitsum_jax.runtime.streams.output import Output, Piece
from nitsum_jax.runtime.streams.router import DeltaStream


class ClientLeftError(Exception):
    """The client has closed its connection: no answer is wanted any more."""


class Outputs:
    """Runs what answers one call of a client; entering submits them, leaving early cancels what is alive.

    All streams wake one consumer, so that what a step of the engine says for all outputs is handled, and written, at
    once.
    """

    def __init__(self, calls: Sequence[Call], backend: Backend, arrival_s: float) -> None:
        """Prepares; see __enter__.

        Args:
          calls: to be run.
          backend: that runs them.
          arrival_s: of the call, time.monotonic; from it the times of all outputs count.
        """
        self._calls = calls
        self._backend = backend
        self._arrival_s = arrival_s
        self._wake = asyncio.Event()
        self._left = False
        self._stack = contextlib.ExitStack()
        self._alive: dict[int, tuple[DeltaStream, Output]] = {}
        make_text, cancel = backend.model.tokenizer.stream, backend.engine.cancel
        self._outputs = [Output(call, make_text(call.skip_special, call.shown), cancel, arrival_s) for call in calls]

    def __enter__(self) -> Self:
        """Submits all calls, or none.

        Raises:
          NitsumError: what the engine refuses.
        """
        with contextlib.ExitStack() as stack:
            for index, (call, output) in enumerate(zip(self._calls, self._outputs, strict=True)):
                stream = self._backend.router.stream(self._backend.engine, call.request, self._wake, self._arrival_s)
                self._alive[index] = (stack.enter_context(stream), output)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def alive(self) -> bool:
        """Whether more is to come."""
        return bool(self._alive)

    @property
    def tokens(self) -> int:
        """Output tokens so far."""
        return sum(output.times.tokens for output in self._outputs)

    @property
    def cached_tokens(self) -> list[int]:
        """Of each output: tokens of its prompt that the prefix cache had, as far as it has begun."""
        return [output.cached_tokens for output in self._outputs]

    def prompt_logprobs(self, index: int) -> list[TokenLogprob]:
        """Of an output that has begun: how likely the tokens of its prompt were, behind the first."""
        return self._outputs[index].prompt_logprobs

    def embedding(self, index: int) -> np.ndarray:
        """Of an output that has ended: the embedding of its prompt, f32[D].

        Raises:
          GenerationError: none came.
        """
        found = self._outputs[index].embedding
        if found is None:
            raise GenerationError("the engine made no embedding of this text: try again")
        return found

    def leave(self) -> None:
        """The client has left: the next call of `next` says so."""
        self._left = True
        self._wake.set()

    async def next(self) -> list[tuple[int, Piece]]:
        """The new pieces of all outputs that have some, each with the index of its output.

        Raises:
          ClientLeftError: `leave` was called.
          NitsumError, DeadlineError, GenerationError: an output failed; see Output.take.
        """
        await self._wake.wait()
        self._wake.clear()
        if self._left:
            raise ClientLeftError
        pieces = []
        for index, (stream, output) in list(self._alive.items()):
            deltas = stream.take()
            if deltas:
                piece = output.take(deltas)
                if piece.end is not None:
                    del self._alive[index]
                pieces.append((index, piece))
        return pieces
