"""One request on its way through the engine."""

import dataclasses
import time
from typing import Any, Protocol

import numpy as np

from nitsum_jax.engine.batching.allowed import AllowedTokens
from nitsum_jax.engine.request import FinishReason, Request, TokenLogprob
from nitsum_jax.engine.step.packing import sampling_columns, steering
from nitsum_jax.meshes.layout import InstanceSpec
from nitsum_jax.models.pooling import Pooling


class Home(Protocol):
    """Where a request is; `Instance` is one."""

    spec: InstanceSpec

    def leave(self, sequence: "LiveRequest") -> None:
        """Lets it go, with its row and its blocks."""

    def note_pages(self, sequence: "LiveRequest") -> None:
        """It may have filled a page."""


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """State of a request, changed by the engine's thread alone.

    What it has cached, generated and owes is written here and nowhere else: others tell by a method what happened.

    Attributes:
      request: what was asked.
      seed: of its random keys.
      tokens: prompt and output that the host knows.
      limit: tokens of prompt and output at which it ends.
      cached: tokens whose keys and values are in the pool once all dispatched steps have run.
      pending: sampled tokens of dispatched steps that the host has not read yet.
      target: prefill reaches to here; the step that gets there samples the next token.
      page_table: i32[K, P]; the first `pages` columns are blocks, each on the device of its vshard.
      pages: pages held.
      dropped: pages behind the window of its model, whose blocks were given back while it was in its present home.
      row: row in its instance's token history, or -1.
      delivered: output tokens that went out; they are not sent again when they are made a second time.
      admitted: order of admission, for choosing whom to send back.
      readmitted: whether it lost its blocks once and is computed again.
      shared: tokens of its prompt that the prefix cache had when it was computed for the first time.
      finish: why it ended; None while it lives.
      home: the instance it is in, or None.
      starts: how often it was started over.
      epoch: results of steps that were dispatched in an earlier epoch count for nothing.
      arrival_s: when it was submitted (time.monotonic).
      ready_s: its KV cache is on its way to its instance until then, in a paced cell; it decodes no earlier.
      landing: pages that it brought or shares may still be on their way, until this step of its home has been taken
        in; 0: they are there.
      keys: of its full pages, as far as somebody asked (see `prefix_index`).
      entered: pages that are in the prefix index, or were offered to it.
      job: what the policy keeps with it; the engine does not look.
      allowed: what it may say next; None: anything.
    """

    request: Request
    seed: int
    tokens: list[int]
    page_table: np.ndarray
    limit: int
    cached: int = 0
    pending: int = 0
    target: int = dataclasses.field(init=False)
    pages: int = 0
    dropped: int = 0
    row: int = -1
    delivered: int = 0
    admitted: int = -1
    readmitted: bool = False
    shared: int = 0
    finish: FinishReason | None = None
    home: "Home | None" = None
    starts: int = 0
    epoch: int = 0
    arrival_s: float = dataclasses.field(default_factory=time.monotonic)
    ready_s: float = 0.0
    landing: int = 0
    keys: list[bytes] = dataclasses.field(default_factory=list)
    entered: int = 0
    job: Any = None
    allowed: AllowedTokens | None = None

    def __post_init__(self) -> None:
        self.target = len(self.tokens)
        request = self.request
        # Where there are masks, stop tokens that come too early are taken out of these.
        min_tokens = 0 if request.form is not None else request.min_tokens
        self.columns = sampling_columns(
            request.sampling,
            self.seed,
            self.prompt_len + len(request.forced_ids),
            min_tokens=min_tokens,
            logprobs=request.logprobs is not None,
        )
        self.stops = frozenset(request.stop_token_ids)
        forbidden = tuple(self.stops) if min_tokens else ()
        steered = bool(forbidden or request.sampling.logit_bias)
        self.steering = steering(request.sampling, forbidden) if steered else None
        self._logprobs: list[TokenLogprob] = []  # of output tokens that have not gone out yet
        self._pooled: np.ndarray | None = None  # f64[D], of what steps have told of its prompt

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def length(self) -> int:
        """Tokens with those still in flight."""
        return len(self.tokens) + self.pending

    @property
    def generated(self) -> int:
        """Output tokens; while it lives with those still in flight."""
        return len(self.tokens) - self.prompt_len + (self.pending if self.finish is None else 0)

    @property
    def prefilling(self) -> bool:
        """Whether tokens are left to be prefilled."""
        return self.cached < self.target

    @property
    def goes_on(self) -> bool:
        """Whether another decode step follows the dispatched ones, unless one of these ends it."""
        return self.finish is None and not self.prefilling and self.length < self.limit

    @property
    def may_decode(self) -> bool:
        """Whether another decode step may be dispatched."""
        if not self.goes_on or self.awaits_mask:
            return False
        return not self.ready_s or self.ready_s <= time.monotonic()

    @property
    def masked(self) -> bool:
        """Whether the choice of its next token is limited."""
        return self.allowed is not None and self.allowed.binds

    @property
    def awaits_mask(self) -> bool:
        """Whether its next step cannot be dispatched before the token of the last one is known, with what follows."""
        return self.allowed is not None and self.allowed.binds and (self.pending > 0 or self.allowed.mask is None)

    def start_over(self, *, again: bool) -> None:
        """Its blocks are gone: it is computed anew from the first token.

        Args:
          again: make the output anew too, token by token as the first time (it is not sent again).  Keys and values
            that a prefill step makes differ in the last bits from those of a decode step, which deterministic mode
            must not let show.
        """
        if again:
            del self.tokens[self.prompt_len :]
            self.keys.clear()
        self.cached = 0
        self.entered = 0
        self.starts += 1
        self._pooled = None
        self.target = len(self.tokens)

    def found(self, tokens: int) -> None:
        """Keys and values of its first tokens are there: others have computed them."""
        self.cached = tokens

    def dispatched(self, tokens: int, *, emits: bool) -> None:
        """A step was dispatched that computes so many of its tokens, and makes its next one or not."""
        self.cached += tokens
        self.pending += emits

    def settled(self, *, emits: bool) -> None:
        """Such a step has ended."""
        self.pending -= emits

    def forget_flights(self) -> None:
        """Results of steps in flight may never come; what they would have said is computed again, to the same token."""
        self.epoch += 1
        self.pending = 0

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> FinishReason | None:
        """Takes a sampled token in; ends the sequence where it must end, and returns why."""
        if token in self.stops and not (self.allowed is not None and self.allowed.given):
            self.finish = FinishReason.STOP
        else:
            self.tokens.append(token)
            if logprob is not None and len(self.tokens) > self.prompt_len + self.delivered:
                self._logprobs.append(logprob)
            if len(self.tokens) >= self.limit:
                self.finish = FinishReason.LENGTH
        return self.finish

    @property
    def counts_every_token(self) -> bool:
        """Whether steps must compute all of its prompt, and nothing may be taken over from others."""
        return self.request.pooling is Pooling.MEAN

    def pool(self, told: np.ndarray, start: int) -> None:
        """Takes in what a step told of a chunk of its prompt, see `pool_tokens`; not if it was started over since."""
        if start != self.starts:
            return
        if self.counts_every_token and self._pooled is not None:
            self._pooled += told
        else:
            self._pooled = told.astype(np.float64)

    def embedding(self) -> np.ndarray | None:
        """f32[D], of length 1, if it was asked for; scaling to that length makes a mean of a sum."""
        if self._pooled is None:
            return None
        length = np.linalg.norm(self._pooled)
        return (self._pooled / (length or 1.0)).astype(np.float32)

    def broken_logits(self) -> str:
        """What to tell its user when the model had no number to choose its next token by."""
        return (
            f"the model produced NaN or infinite logits for request {self.request.id} after {len(self.tokens)} tokens "
            "of prompt and output: check the checkpoint for damaged weights, and try --dtype=float32"
        )

    def take_undelivered(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Output tokens not yet sent, with their log probabilities; from now on they count as delivered."""
        new, logprobs = tuple(self.tokens[self.prompt_len + self.delivered :]), tuple(self._logprobs)
        self._logprobs.clear()
        self.delivered += len(new)
        return new, logprobs
