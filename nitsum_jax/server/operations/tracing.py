"""OpenTelemetry: one span per request, made when it ends, so that a trace costs a stream nothing while it runs.

The packages are imported only where tracing is asked for (the extra `otel`).
"""

import time
from typing import Any

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.errors import PreconditionError
from nitsum_jax.runtime.records import ServedRequest

_MISSING = (
    "tracing needs OpenTelemetry: pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http, or start "
    "without --otlp_endpoint"
)
_NS = 1e9


class RequestTracer:
    """Makes spans of request records and hands them to an exporter, on a thread of its own."""

    def __init__(self, exporter: Any, model: str, version: str, *, batch: bool = True) -> None:
        """Starts the exporter's thread.

        Args:
          exporter: an opentelemetry.sdk.trace.export.SpanExporter.
          model: name, as an attribute of each span.
          version: of this package.
          batch: collect spans and send them from a thread; False: send each as it ends.

        Raises:
          PreconditionError: OpenTelemetry is not installed.
        """
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise PreconditionError(_MISSING) from None
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "nitsum-serve", "service.version": version}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter) if batch else SimpleSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nitsum_jax", version)
        self._model = model

    def ended(self, record: ServedRequest) -> None:
        """Exports a request that ended, as a child of the client's span if it sent one."""
        # Records are on the monotonic clock, spans on the wall's.
        offset_s = time.time() - time.monotonic()

        def at(seconds: float) -> int:
            return int((seconds + offset_s) * _NS)

        parent = self._propagator.extract({"traceparent": record.traceparent}) if record.traceparent else None
        span = self._tracer.start_span(
            "generate",
            context=parent,
            kind=self._trace.SpanKind.SERVER,
            start_time=at(record.arrival_s),
            attributes=_attributes(record, self._model),
        )
        for name, time_s in (
            ("admitted", record.admitted_s),  # before it: queue
            ("first_token", record.first_s),  # before it: prefill
            ("last_token", record.last_s),  # before it: decode
        ):
            if time_s is not None:
                span.add_event(name, timestamp=at(time_s))
        if record.finish is FinishReason.ERROR:
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, record.error))
        span.end(end_time=at(record.ended_s if record.ended_s is not None else record.arrival_s))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def otlp_tracer(endpoint: str, model: str, version: str) -> RequestTracer:
    """A tracer that sends to an OTLP collector over HTTP.

    Args:
      endpoint: such as http://127.0.0.1:4318; the path /v1/traces is added where none is given.
      model: name, as an attribute of each span.
      version: of this package.

    Raises:
      PreconditionError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise PreconditionError(_MISSING) from None
    scheme, _, rest = endpoint.partition("://")
    path = "" if "/" in rest.rstrip("/") else "/v1/traces"
    return RequestTracer(OTLPSpanExporter(endpoint=f"{scheme}://{rest.rstrip('/')}{path}"), model, version)


def _attributes(record: ServedRequest, model: str) -> dict[str, str | int | float]:
    given = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
        "gen_ai.usage.output_tokens": record.tokens,
        "gen_ai.response.finish_reasons": None if record.finish is None else (str(record.finish),),
        "nitsum.request_id": record.id,
        "nitsum.x_request_id": record.call_id or None,
        "nitsum.tier": record.tier,
        "nitsum.client": record.client or None,
        "nitsum.ttft_s": record.ttft_s,
        "nitsum.tpot_s": record.tpot_s,
    }
    return {name: value for name, value in given.items() if value is not None}  # type: ignore[misc]
