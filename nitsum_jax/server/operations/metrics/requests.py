"""Counters and histograms of requests, by tier: one observation per request, when it ends."""

import dataclasses
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

from nitsum_jax.control.tiers import TierSet
from nitsum_jax.engine.request import FinishReason
from nitsum_jax.errors import InvalidInputError, NitsumError, OverloadedError, PreconditionError, UnavailableError
from nitsum_jax.runtime.records import ServedRequest
from nitsum_jax.server.operations.metrics import buckets
from nitsum_jax.server.security.errors import DeniedError

OTHER_TIER = "unknown"
"""Stands for names that are no tier: a client cannot make new time series by inventing some."""

_FINISHED: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",  # as vLLM calls it
    FinishReason.DEADLINE: "deadline",
    FinishReason.ERROR: "error",
}
_REFUSALS: Final = (
    (DeniedError, "denied"),
    (OverloadedError, "queue_full"),
    (UnavailableError, "unavailable"),
    (PreconditionError, "precondition"),
    (InvalidInputError, "invalid"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class _OfTier:
    """Children of the labelled metrics: looked up once per tier instead of once per request."""

    prompt_tokens: Counter
    ttft: Histogram
    tpot: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    e2e: Histogram
    prompt_length: Histogram
    output_length: Histogram
    counted: Counter
    good: Counter


class RequestMetrics:
    """Everything that is known of a request when it ends."""

    def __init__(self, registry: CollectorRegistry, model: str, tiers: TierSet) -> None:
        """Registers the metrics, with every tier at zero: a series that is not there yet would look like a fault.

        Args:
          registry: takes them.
          model: value of the label model_name.
          tiers: values of the label tier, and the targets.
        """
        self._tiers = tiers
        self._model = model
        labels = ("model_name", "tier")

        def histogram(name: str, what: str, borders: tuple[float, ...]) -> Histogram:
            return Histogram(f"nitsum_{name}", what, labels, registry=registry, buckets=borders)

        def counter(name: str, what: str, *more: str) -> Counter:
            return Counter(f"nitsum_{name}", what, (*labels, *more), registry=registry)

        ttfts = buckets.with_targets(buckets.TTFT_S, (tier.ttft_ms for tier in tiers))
        tpots = buckets.with_targets(buckets.TPOT_S, (tier.tpot_ms for tier in tiers))
        self._success = counter("request_success", "Requests that ended, by how.", "finished_reason")
        self._refused = counter("requests_refused", "Requests refused on submission, by why.", "reason")
        prompt_tokens = counter("prompt_tokens", "Prompt tokens of the requests that ended.")
        ttft = histogram("time_to_first_token_seconds", "Arrival of a request to its first token.", ttfts)
        tpot = histogram("time_per_output_token_seconds", "Mean time per token after the first, per request.", tpots)
        queue = histogram("request_queue_time_seconds", "Arrival to admission by an instance.", buckets.QUEUE_S)
        prefill = histogram("request_prefill_time_seconds", "Admission to first token.", buckets.TTFT_S)
        decode = histogram("request_decode_time_seconds", "First token to last token.", buckets.LATENCY_S)
        e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", buckets.LATENCY_S)
        prompt = histogram("request_prompt_tokens", "Length of prompts, tokens.", buckets.TOKENS)
        output = histogram("request_generation_tokens", "Length of outputs, tokens.", buckets.TOKENS)
        counted = counter("slo_requests", "Requests that count for the targets: not left by their clients.")
        good = counter("goodput_requests", "Requests that met both targets of their tier.")
        self._of = {
            name: _OfTier(
                prompt_tokens.labels(model, name),
                ttft.labels(model, name),
                tpot.labels(model, name),
                queue.labels(model, name),
                prefill.labels(model, name),
                decode.labels(model, name),
                e2e.labels(model, name),
                prompt.labels(model, name),
                output.labels(model, name),
                counted.labels(model, name),
                good.labels(model, name),
            )
            for name in tiers.names
        }
        for name in tiers.names:
            for reason in _FINISHED.values():
                self._success.labels(model, name, reason)
            for _, reason in _REFUSALS:
                self._refused.labels(model, name, reason)

    def ended(self, record: ServedRequest) -> None:
        """Observes a request that ended."""
        mine = self._of.get(record.tier)
        if mine is None or record.finish is None or record.ended_s is None:
            return
        self._success.labels(self._model, record.tier, _FINISHED[record.finish]).inc()
        mine.prompt_tokens.inc(record.prompt_tokens)
        mine.prompt_length.observe(record.prompt_tokens)
        mine.output_length.observe(record.tokens)
        mine.e2e.observe(record.ended_s - record.arrival_s)
        if record.queue_s is not None:
            mine.queue.observe(record.queue_s)
        if record.ttft_s is not None:
            mine.ttft.observe(record.ttft_s)
        if record.first_s is not None and record.admitted_s is not None:
            mine.prefill.observe(record.first_s - record.admitted_s)
        if record.first_s is not None and record.last_s is not None:
            mine.decode.observe(record.last_s - record.first_s)
        if record.tpot_s is not None:
            mine.tpot.observe(record.tpot_s)
        met = record.met(self._tiers.get(record.tier))
        if met is not None:
            mine.counted.inc()
            mine.good.inc(met)

    def refused(self, tier: str, error: NitsumError) -> None:
        """Counts a request that was not taken."""
        reason = next((name for kind, name in _REFUSALS if isinstance(error, kind)), "other")
        self._refused.labels(self._model, tier if tier in self._of else OTHER_TIER, reason).inc()
