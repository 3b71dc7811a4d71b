"""What goes into an engine and what comes out: requests, sampling parameters and token deltas."""

import dataclasses
import enum
from typing import Protocol

import numpy as np

from nitsum_jax.errors import ContextLengthError, InvalidInputError, PreconditionError
from nitsum_jax.models.pooling import Pooling

MAX_SEED = 2**32 - 1
MAX_LOGIT_BIAS = 300  # entries of one request
MAX_STOP_IDS = 128  # of one request with min_tokens
MAX_TOP_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of one request is chosen.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of most likely tokens whose probabilities sum to at least this; 1 keeps all.
      min_p: keep tokens at least this many times as likely as the most likely one; 0 keeps all.
      repetition_penalty: > 1 makes tokens of prompt and output less likely (CTRL, arXiv 1909.05858); 1 is off.
      presence_penalty: subtracted once from the logit of every token already in the output; 0 is off.
      frequency_penalty: subtracted from the logit of a token for each of its occurrences in the output; 0 is off.
      seed: together with the position it is the whole random key; None: the engine draws one for each request.
      logit_bias: pairs of a token id and the bias, -100 to 100, added to its logit; each id once; -100 forbids it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def validate(self) -> None:
        """Raises InvalidInputError, naming the field and its range, if a value is out of range (NaN included)."""
        _require(self.temperature >= 0 and self.temperature <= 100, "temperature", self.temperature, "0 to 100")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 (off) to 1")
        _require(0 < self.repetition_penalty <= 100, "repetition_penalty", self.repetition_penalty, "over 0, 1 is off")
        _require(-100 <= self.presence_penalty <= 100, "presence_penalty", self.presence_penalty, "-100 to 100")
        _require(-100 <= self.frequency_penalty <= 100, "frequency_penalty", self.frequency_penalty, "-100 to 100")
        if self.seed is not None:
            _require(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "entries of logit_bias",
            len(self.logit_bias),
            f"at most {MAX_LOGIT_BIAS}",
        )
        for token, bias in self.logit_bias:
            _require(-100 <= bias <= 100, f"logit_bias of token {token}", bias, "-100 to 100")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise InvalidInputError("logit_bias names a token twice: give each token id once")


class TokenMatcher(Protocol):
    """Follows one output, and says which tokens may come next; used by one thread at a time."""

    # ruff: noqa: D102
    def accept(self, token: int) -> None: ...  # raises if it may not come next
    def restart(self) -> None: ...  # before the first token again
    def allowed(self, mask: np.ndarray) -> None: ...  # writes the bits of the next token, i32[W], see `masks`
    @property
    def ended(self) -> bool: ...  # whether nothing may follow


class OutputForm(Protocol):
    """A form that outputs are held to."""

    @property
    def first_mask(self) -> np.ndarray: ...  # for the first token, i32[W]
    def matcher(self) -> TokenMatcher: ...  # for one output


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be continued.

    Attributes:
      id: unique among the requests that are alive in the engine.
      prompt_ids: token ids, at least one.
      max_tokens: at most this many new tokens, at least one.
      sampling: how tokens are chosen.
      stop_token_ids: generation ends with any of these (the end-of-sequence ids of the model go here too).
      tier: name of the latency tier.
      deadline_s: give up at this time on the engine's monotonic clock (time.monotonic); None never gives up.
      min_tokens: before so many new tokens no stop token can be chosen; 0 is off.
      logprobs: None, or how many of the most likely tokens, 0 to 20, a delta lists beside the log probability of each
        of its tokens.
      form: what the output is held to; it ends where the form does.
      forced_ids: what the output begins with, whatever the model says; stop tokens among them end nothing, and
        `min_tokens` counts from behind them.
      ttft_ms: target for the time to its first token, milliseconds; None: that of its tier.
      tpot_ms: target for the time per output token, milliseconds; None: that of its tier.
      generated: output that another engine has made of it already; it goes on from there. It counts as output (of
        max_tokens, min_tokens and the penalties) and is not sent again.
      pooling: how its prompt becomes an embedding, which comes with its one token; None: none is wanted.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: tuple[int, ...] = ()
    tier: str = "standard"
    deadline_s: float | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    form: OutputForm | None = None
    forced_ids: tuple[int, ...] = ()
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    generated: tuple[int, ...] = ()
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class RequestLimits:
    """What requests must keep to be taken by an engine.

    Attributes:
      vocab_size: token ids are below it.
      tier_names: tiers that there are.
      max_model_len: most tokens of prompt and output together.
      pool_tokens: tokens of KV cache that an instance holds.
      pooling: how embeddings are made; None: none are.
    """

    vocab_size: int
    tier_names: tuple[str, ...]
    max_model_len: int
    pool_tokens: int
    pooling: Pooling | None = None


def check_request(request: Request, limits: RequestLimits) -> None:
    """Refuses a request that an engine cannot serve, whatever else it does.

    Raises:
      InvalidInputError: the request is wrong in itself.
      PreconditionError: it cannot be served by this engine: longer than its pool.
    """
    request.sampling.validate()
    if request.tier not in limits.tier_names:
        raise InvalidInputError(f"tier '{request.tier}' is not known: give one of {', '.join(limits.tier_names)}")
    if not request.prompt_ids:
        raise InvalidInputError("the prompt is empty: give at least one token")
    if request.max_tokens < 1:
        raise InvalidInputError(f"max_tokens={request.max_tokens} must be at least 1")
    vocab = limits.vocab_size
    if len(request.forced_ids) > request.max_tokens:
        raise InvalidInputError(
            f"{len(request.forced_ids)} forced ids are more than max_tokens={request.max_tokens} allows"
        )
    if not 0 <= request.min_tokens <= request.max_tokens:
        raise InvalidInputError(f"min_tokens={request.min_tokens} must be from 0 to max_tokens, {request.max_tokens}")
    if request.min_tokens and len(set(request.stop_token_ids)) > MAX_STOP_IDS:
        raise InvalidInputError(
            f"{len(request.stop_token_ids)} stop token ids are too many with min_tokens: give at most {MAX_STOP_IDS}"
        )
    _check_pooling(request, limits)
    if request.logprobs is not None and not 0 <= request.logprobs <= MAX_TOP_LOGPROBS:
        raise InvalidInputError(f"logprobs={request.logprobs} is out of range: give 0 to {MAX_TOP_LOGPROBS}")
    if len(request.generated) >= request.max_tokens:
        raise InvalidInputError(
            f"{len(request.generated)} tokens are generated already: max_tokens={request.max_tokens} leaves none"
        )
    biased = [token for token, _ in request.sampling.logit_bias]
    for name, ids in (
        ("prompt", request.prompt_ids),
        ("generated", request.generated),
        ("stop_token_ids", request.stop_token_ids),
        ("logit_bias", biased),
        ("forced_ids", request.forced_ids),
    ):
        wrong = next((token for token in ids if not 0 <= token < vocab), None)
        if wrong is not None:
            raise InvalidInputError(f"{name} has the token id {wrong}: ids go from 0 to {vocab - 1}")
    limit = limits.max_model_len
    pool = limits.pool_tokens
    if len(request.prompt_ids) >= limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens, prompt and output together, and the prompt "
            f"has {len(request.prompt_ids)} tokens: shorten it"
        )
    if len(request.prompt_ids) + len(request.generated) >= limit:
        raise ContextLengthError(
            f"This model's maximum context length is {limit} tokens, prompt and output together, and the prompt and "
            f"{len(request.generated)} tokens that were generated leave none: it has come to its end"
        )
    tokens = min(len(request.prompt_ids) + request.max_tokens, limit)
    if tokens > pool:
        raise PreconditionError(
            f"prompt and max_tokens come to {tokens} tokens, and the KV cache of an instance holds {pool} in the "
            "present layout: shorten the prompt, or ask for fewer tokens"
        )


def _check_pooling(request: Request, limits: RequestLimits) -> None:
    if request.pooling is None:
        return
    if limits.pooling is None:
        raise PreconditionError(
            "this model gives no embeddings: serve one whose files say how it makes them, or start with --pooling=last "
            "or mean"
        )
    if request.pooling is not limits.pooling:
        raise PreconditionError(f"embeddings are made by pooling={limits.pooling} here, not {request.pooling}")
    if request.max_tokens != 1 or request.form is not None or request.forced_ids:
        raise InvalidInputError("a request for an embedding makes one token, of no form: give max_tokens=1")


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"  # a stop token (the front ends also report it for a stop string)
    LENGTH = "length"  # max_tokens, or the context is full
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, by the model's own distribution: natural logarithms of the softmax of the bare logits.

    Temperature, penalties, bias and the filters of sampling are not included, so a token may have been chosen that was
    not the most likely one.

    Attributes:
      logprob: log probability of the token that was chosen.
      top: token id and log probability of as many of the most likely tokens as were asked for, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one request, in order; the last delta of a request carries finish_reason.

    Attributes:
      request_id: whose tokens these are.
      token_ids: new token ids; a stop token that ended the request is not among them.
      time_s: when the engine had them (time.monotonic).
      finish_reason: None while more is to come.
      error: one line for the user when finish_reason is ERROR.
      logprobs: one for each of token_ids if the request asked for them, else empty.
      cached_tokens: tokens of the prompt that the prefix cache had; known from the first token on, the same in all
        deltas that follow.
      embedding: f32[D], of length 1, with the last delta of a request that asked for it.
    """

    request_id: str
    token_ids: tuple[int, ...]
    time_s: float
    finish_reason: FinishReason | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    cached_tokens: int = 0
    embedding: np.ndarray | None = dataclasses.field(default=None, compare=False)


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise InvalidInputError(f"{name}={value} is out of range: give {allowed}")
