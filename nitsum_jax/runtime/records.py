"""What is recorded of one request while it lives, and the callbacks for its end."""

import dataclasses
from typing import Protocol

from nitsum_jax.control.tiers import Tier
from nitsum_jax.engine.request import FinishReason, TokenDelta
from nitsum_jax.errors import NitsumError


@dataclasses.dataclass(slots=True)
class ServedRequest:
    """Times and counts of one request; all times are seconds on the engine's clock (time.monotonic).

    Attributes:
      id: of the request.
      tier: name of its latency tier.
      prompt_tokens: length of its prompt.
      arrival_s: when the last of its bytes was read; over gRPC, which does not tell that, when its handler was called.
      client: name of its API key; empty without keys.
      traceparent: W3C trace context that came with it; empty if none came.
      call_id: x-request-id of the call that it belongs to; empty if it has none.
      fairness_id: whom a gateway says it is for; empty if none does.
      ttft_target_ms, tpot_target_ms: targets of its own; None: those of its tier.
      admitted_s: when an instance took it; None while it waits.
      first_s: when the engine had its first token.
      last_s: when the engine had its last token so far.
      tokens: output tokens so far.
      cached_tokens: of the prompt, that the prefix cache had.
      ended_s: when it ended; None while it lives.
      finish: why it ended. The engine says it; a front end that ends an output itself (at a stop string) says so here.
      error: the engine's line if finish is ERROR.
    """

    id: str
    tier: str
    prompt_tokens: int
    arrival_s: float
    client: str = ""
    traceparent: str = ""
    call_id: str = ""
    fairness_id: str = ""
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None
    admitted_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    ended_s: float | None = None
    finish: FinishReason | None = None
    error: str | None = None

    def take(self, delta: TokenDelta) -> None:
        """Notes a delta: a few assignments, as it happens for every stream in every step."""
        if delta.token_ids:
            if self.first_s is None:
                self.first_s = delta.time_s
                self.cached_tokens = delta.cached_tokens
            self.last_s = delta.time_s
            self.tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            self.ended_s = delta.time_s
            self.cached_tokens = self.cached_tokens or delta.cached_tokens  # the first token may have ended it
            if self.finish is None:
                self.finish = delta.finish_reason
                self.error = delta.error

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None without one."""
        return None if self.first_s is None else self.first_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """(last token time - first token time) / (tokens - 1); None below two tokens."""
        if self.first_s is None or self.last_s is None or self.tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.tokens - 1)

    @property
    def queue_s(self) -> float | None:
        """Arrival to admission; None if it was never admitted."""
        return None if self.admitted_s is None else self.admitted_s - self.arrival_s

    def met(self, tier: Tier) -> bool | None:
        """Whether it met both targets, its own or those of its tier; None if it does not count.

        A request whose client left, or that the server cut off, says nothing about the targets. One that failed or ran
        into its deadline missed them. One without a second token has no TPOT to miss.
        """
        if self.finish in (None, FinishReason.CANCELLED):
            return None
        tier = tier.with_targets(self.ttft_target_ms, self.tpot_target_ms)
        ttft, tpot = self.ttft_s, self.tpot_s
        if self.finish in (FinishReason.ERROR, FinishReason.DEADLINE):
            return False
        # An output that ended at its very first token (a stop token) was complete then.
        first = ttft if ttft is not None else (self.ended_s or self.arrival_s) - self.arrival_s
        return first * 1e3 <= tier.ttft_ms and (tpot is None or tpot * 1e3 <= tier.tpot_ms)


class RequestObserver(Protocol):
    """Is notified about requests, on the event loop."""

    def ended(self, record: ServedRequest) -> None:
        """A request that was accepted has ended."""

    def refused(self, tier: str, error: NitsumError) -> None:
        """A request was refused on submission; `tier` is what it asked for, known or not."""
