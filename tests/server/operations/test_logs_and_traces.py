import asyncio
import json
import logging
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.errors import PreconditionError
from nitsum_jax.server.launch.ops_flags import OpsOptions
from nitsum_jax.server.operations import logs
from nitsum_jax.server.operations.tracing import RequestTracer, otlp_tracer
from nitsum_jax.server.proto import nitsum_pb2
from tests.server.harness import ask, says
from tests.server.operations.http import fetch
from tests.server.operations.ports import opened, record


class Log:
    """What was logged to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def lines(self) -> list[str]:
        """The lines since the last call."""
        return self._capsys.readouterr().err.splitlines()


@pytest.fixture
def log(capsys: pytest.CaptureFixture[str]) -> Log:
    return Log(capsys)


def test_one_json_line_per_request_and_nothing_of_what_was_said(log: Log) -> None:
    logs.configure("info", "json")

    async def scenario() -> None:
        async with opened(OpsOptions(), says("confidential answer"), cached=lambda request: 16) as open_:
            await ask(open_.run.stub, "confidential question", tier="batch")
            await ask(open_.run.stub, "confidential question", max_tokens=1)
            message = nitsum_pb2.GenerateRequest(text="x")
            for value in ("proxy/7", "not sane"):
                call = open_.run.stub.Generate(message, metadata=(("x-request-id", value),))
                assert [event async for event in call]
            body = json.dumps({"model": "fake", "prompt": "confidential", "n": 2}).encode()
            headers = {"content-type": "application/json", "x-request-id": "web-17"}
            reply = await fetch(f"{open_.api}/v1/completions", "POST", headers, body)
            assert reply.headers["x-request-id"] == "web-17"
            ids.append(reply.json["id"])

    ids: list[str] = []
    asyncio.run(scenario())
    lines = log.lines()
    assert "confidential" not in "".join(lines)
    mine = [entry for entry in map(json.loads, lines) if entry["logger"] == "nitsum_jax.requests"]
    assert [entry.get("x_request_id") for entry in mine] == [None, None, "proxy/7", None, "web-17", "web-17"]
    assert sorted(entry["request"] for entry in mine[4:]) == [f"{ids[0]}-0", f"{ids[0]}-1"]
    first = mine[0]
    assert (first["level"], first["tier"], first["finish"]) == ("info", "batch", "stop")
    assert (first["prompt_tokens"], first["cached_tokens"], first["output_tokens"]) == (21, 16, 19)
    assert 0 <= first["queue_ms"] <= first["ttft_ms"]
    assert first["tpot_ms"] > 0
    assert first["time"].endswith("Z")
    assert "tpot_ms" not in mine[1]
    assert mine[1]["finish"] == "length"


def test_text_lines_and_levels(log: Log) -> None:
    logs.configure("info", "text")
    logs.log_request(record(finish=FinishReason.ERROR, error="it broke", cached_tokens=4))
    (line,) = log.lines()
    assert (
        "INFO nitsum_jax.requests: request=r tier=interactive prompt_tokens=7 cached_tokens=4 output_tokens=10" in line
    )
    assert "ttft_ms=200.0 tpot_ms=10.0 finish=error error='it broke'" in line
    logs.configure("warning", "text")
    logs.log_request(record())
    assert log.lines() == []


def test_json_lines_stay_lines_whatever_they_say(log: Log) -> None:
    logs.configure("info", "json")
    try:
        raise ZeroDivisionError("two\nlines")
    except ZeroDivisionError:
        logging.getLogger("x").exception("a\nb %s", "ü")
    (line,) = log.lines()
    entry = json.loads(line)
    assert entry["message"] == "a\nb ü"
    assert "ZeroDivisionError: two\nlines" in entry["trace"]


def test_a_request_is_a_span_with_its_moments() -> None:
    exporter = InMemorySpanExporter()
    tracer = RequestTracer(exporter, "model-x", "1", batch=False)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    tracer.ended(record(client="alice", traceparent=parent, call_id="web-17", cached_tokens=4))
    tracer.ended(record(admitted_s=None, first_s=None, last_s=None, tokens=0, finish=FinishReason.ERROR, error="broke"))
    tracer.close()
    good, bad = exporter.get_finished_spans()
    assert good.name == "generate"
    assert format(good.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert good.parent is not None
    assert format(good.parent.span_id, "016x") == "b7ad6b7169203331"
    assert good.start_time is not None
    assert good.end_time is not None
    assert (good.end_time - good.start_time) / 1e9 == pytest.approx(0.29, abs=1e-3)
    moments = {event.name: (event.timestamp - good.start_time) / 1e9 for event in good.events}
    assert moments == {
        "admitted": pytest.approx(0.05, abs=1e-3),
        "first_token": pytest.approx(0.2, abs=1e-3),
        "last_token": pytest.approx(0.29, abs=1e-3),
    }
    assert good.attributes is not None
    assert good.attributes["nitsum.tier"] == "interactive"
    assert good.attributes["nitsum.client"] == "alice"
    assert good.attributes["nitsum.x_request_id"] == "web-17"
    assert good.attributes["gen_ai.usage.output_tokens"] == 10
    assert good.attributes["gen_ai.usage.cache_read.input_tokens"] == 4
    assert good.attributes["gen_ai.request.model"] == "model-x"
    assert bad.parent is None
    assert bad.status.description == "broke"
    assert [event.name for event in bad.events] == []


def test_the_trace_context_of_a_grpc_call_arrives() -> None:
    exporter = InMemorySpanExporter()

    async def scenario() -> None:
        async with opened(OpsOptions()) as open_:
            operations = open_.ports.views.present()
            operations._tracer = RequestTracer(exporter, "fake", "1", batch=False)
            metadata = (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),)
            message = nitsum_pb2.GenerateRequest(text="abc")
            assert [event async for event in open_.run.stub.Generate(message, metadata=metadata)]

    asyncio.run(scenario())
    (span,) = exporter.get_finished_spans()
    assert format(span.context.trace_id, "032x") == "0af7651916cd43dd8448eb211c80319c"
    assert [event.name for event in span.events] == ["admitted", "first_token", "last_token"]


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(PreconditionError, match="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"):
        otlp_tracer("http://127.0.0.1:4318", "m", "1")


def test_a_server_that_does_not_trace_does_not_load_opentelemetry() -> None:
    code = "import sys, nitsum_jax.server.launch.main; sys.exit('opentelemetry' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
