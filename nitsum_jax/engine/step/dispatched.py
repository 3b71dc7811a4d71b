"""What an instance has dispatched, and what comes to it from others."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from nitsum_jax.engine.live_request import Home, LiveRequest
from nitsum_jax.engine.request import TokenLogprob
from nitsum_jax.engine.step.logprobs import read
from nitsum_jax.engine.step.packing import StepShape, tables_of


class Chunk(NamedTuple):
    """Tokens of a prompt that a step computes, and the context before them; cost models take it as a bare pair."""

    tokens: int
    context: int


@dataclasses.dataclass(eq=False)
class Step:
    """A dispatched step.

    Attributes:
      shape: its bucket.
      sequences: who took part; of a step with a chunk, first the one whose prompt that is.
      emits: who gets a token of it.
      number: counts the steps of its instance, from 1.
      after: steps of other instances whose results must be taken in before its own: their sequences went over.
      settled: whether its results were taken in, or never will be.
      epochs: of the sequences, when it was dispatched.
      packed: its inputs, while it is in flight.
      chunk: of a prefill or a mixed step.
      joined: whether it shares, for the cost model, a step with the chunk before it.
      context: tokens of KV cache that those which decode hold together before it.
      launched_s: when it was dispatched; all times are those of time.monotonic.
      ready_s: when its results were read.
      start_s: when it began, as far as can be told: when it was dispatched, or the step before it ended.
      paced_s: its results are not delivered before; see `pacing`.
      tokens: i32[B], when they are read.
      token_logprobs: i32[B, columns], when they are read, if somebody asked for log probabilities.
      pooled: f32[B, D], when it is read, if the prompt of its chunk becomes an embedding.
      start: how often that prompt had been started over.
      error: why it failed.
    """

    shape: StepShape
    sequences: list[LiveRequest]
    emits: list[bool]
    number: int = 0
    after: tuple["Step", ...] = ()
    settled: bool = False
    chunk: Chunk | None = None
    joined: bool = False
    context: int = 0
    launched_s: float = 0.0
    ready_s: float = 0.0
    start_s: float = 0.0
    paced_s: float = 0.0
    epochs: list[int] = dataclasses.field(default_factory=list)
    packed: np.ndarray | None = None
    tokens: np.ndarray | None = None
    token_logprobs: np.ndarray | None = None
    pooled: np.ndarray | None = None
    start: int = 0
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.epochs = [sequence.epoch for sequence in self.sequences]
        self.start = self.sequences[0].starts if self.sequences else 0

    @property
    def decoding(self) -> int:
        """How many sequences continue from their own last token."""
        return len(self.sequences) - (self.chunk is not None)

    def tokens_of(self, sequence: LiveRequest) -> int:
        """How many tokens of a sequence it computes."""
        if self.chunk is not None and sequence is self.sequences[0]:
            return self.chunk.tokens
        return int(sequence in self.sequences)

    @property
    def with_logprobs(self) -> bool:
        """Whether somebody asked for log probabilities of a token of this step."""
        return any(
            emits and sequence.request.logprobs is not None
            for sequence, emits in zip(self.sequences, self.emits, strict=True)
        )

    @property
    def pools(self) -> bool:
        """Whether the prompt of its chunk becomes an embedding."""
        return self.chunk is not None and self.sequences[0].request.pooling is not None

    def page_table(self, vshards: int, pages: int) -> np.ndarray:
        """Block tables that it was given, i32[rows, K, P]; columns that a sequence does not use are 0."""
        if self.packed is None:
            return np.zeros((0, vshards, pages), np.int32)
        return tables_of(self.packed, self.shape, vshards, pages)

    def logprob(self, index: int) -> TokenLogprob | None:
        """How likely the token of a row was, if that was asked for."""
        top = self.sequences[index].request.logprobs
        return None if top is None or self.token_logprobs is None else read(self.token_logprobs[index], top)

    @property
    def due(self) -> bool:
        """Whether all steps that it continues have been taken in."""
        return all(step.settled for step in self.after)

    def settle(self, instance: Home) -> None:
        """It has been taken in, and so has all that was launched before it on the devices of its instance."""
        for sequence in self.sequences:
            if sequence.home is instance and sequence.landing <= self.number:
                sequence.landing = 0
        self.settled = True
        self.after = ()
        self.packed = None


@dataclasses.dataclass(frozen=True)
class IncomingRequest:
    """A sequence that comes with its blocks.

    Attributes:
      sequence: who.
      history: token history of the instance that it comes from; it knows the tokens in flight.
      row: its row there.
    """

    sequence: LiveRequest
    history: jax.Array
    row: int


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillChoice:
    """What a step does for a prompt.

    Attributes:
      sequence: whose prompt.
      tokens: at most so many; None: as many as a step can take.
      joined: whether it is, for the cost model, a part of the same step as the chunk before it.
      fused: whether the sequences that decode get their tokens in the same step, if it does all of `tokens` and the
        cell has mixed steps.
    """

    sequence: LiveRequest
    tokens: int | None = None
    joined: bool = False
    fused: bool = False
