"""One Generate call as the client sees it: its text as it comes, and its outcome."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from nitsum_jax.errors import one_line
from nitsum_jax.server import cli
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

_EXIT_CODES = {
    grpc.StatusCode.INVALID_ARGUMENT: cli.EXIT_USAGE,
    grpc.StatusCode.FAILED_PRECONDITION: cli.EXIT_USAGE,
    grpc.StatusCode.UNAVAILABLE: cli.EXIT_UNAVAILABLE,
}
_NOT_CONNECTED = ("failed to connect", "DNS resolution failed", "name resolution", "address lookup")


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a call failed: gRPC code, one line, and the exit status that goes with it."""

    code: str
    message: str
    exit_code: int

    @classmethod
    def of(cls, error: grpc.aio.AioRpcError, server: str) -> "Failure":
        """Translates what gRPC says."""
        code, details = error.code(), one_line(error.details() or "no details")
        message = details
        if code is grpc.StatusCode.UNAVAILABLE and any(phrase in details for phrase in _NOT_CONNECTED):
            message = f"no server answers at {server}: start one with nitsum-serve, or name another with --server"
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            message = f"the server at {server} is not nitsum-serve, or another version of it ({details})"
        elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = "the request took longer than --timeout"
        elif code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            metadata = error.trailing_metadata() or ()
            hint = next((value for key, value in metadata if key == "retry-after-ms"), None)
            message += f" (try again in {hint} ms, or use --concurrency)" if hint else ""
        return cls(code.name, message, _EXIT_CODES.get(code, cli.EXIT_FAILED))


@dataclasses.dataclass(slots=True)
class CallOutcome:
    """What came of one request; times are seconds on the client's clock."""

    index: int
    started: nitsum_pb2.Started | None = None
    finished: nitsum_pb2.Finished | None = None
    failure: Failure | None = None
    text: str = ""
    output_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[nitsum_pb2.TokenLogprob] = dataclasses.field(default_factory=list)
    reasoning: str = ""
    tool_calls: list[dict[str, str]] = dataclasses.field(default_factory=list)
    first_s: float | None = None
    last_s: float | None = None
    begun_s: float = 0.0

    @property
    def ttft_ms(self) -> float | None:
        """Call to first token in milliseconds, as seen here."""
        return None if self.first_s is None else (self.first_s - self.begun_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """(last token time - first token time) / (tokens - 1) in milliseconds, as seen here."""
        if self.first_s is None or self.last_s is None or len(self.output_ids) < 2:
            return None
        return (self.last_s - self.first_s) * 1e3 / (len(self.output_ids) - 1)

    def as_json(self) -> dict[str, Any]:
        """The object that --json prints."""
        started, finished = self.started, self.finished
        result: dict[str, Any] = {
            "index": self.index,
            "request_id": started.request_id if started else None,
            "prompt_ids": list(started.prompt_ids) if started else None,
            "output_ids": self.output_ids,
            "text": self.text,
            "finish_reason": _reason(finished) if finished else None,
            "usage": {
                "prompt_tokens": started.prompt_tokens if started else None,
                "cached_tokens": finished.usage.cached_tokens if finished else None,
                "output_tokens": finished.usage.output_tokens if finished else len(self.output_ids),
            },
            "ttft_ms": _rounded(self.ttft_ms),
            "tpot_ms": _rounded(self.tpot_ms),
            "server_ttft_ms": _rounded(finished.ttft_ms) if finished and finished.HasField("ttft_ms") else None,
            "server_tpot_ms": _rounded(finished.tpot_ms) if finished and finished.HasField("tpot_ms") else None,
            "seed": started.seed if started else None,
        }
        if self.logprobs:
            result["logprobs"] = [_logprob(one) for one in self.logprobs]
        if self.reasoning:
            result["reasoning"] = self.reasoning
        if self.tool_calls:
            result["tool_calls"] = self.tool_calls
        if finished is not None and finished.prompt_logprobs:
            result["prompt_logprobs"] = [_logprob(one) for one in finished.prompt_logprobs]
        if finished is not None and finished.HasField("stop"):
            result["stop"] = finished.stop
        if self.failure is not None:
            result["error"] = {"code": self.failure.code, "message": self.failure.message}
        return result

    def summary(self) -> str:
        """One line about the request, for people."""
        if self.finished is None:
            return self.failure.message if self.failure else "no answer"
        usage = self.finished.usage
        cached = f" ({usage.cached_tokens} of them cached)" if usage.cached_tokens else ""
        line = f"{usage.prompt_tokens}{cached} + {usage.output_tokens} tokens, {_reason(self.finished)}"
        if self.ttft_ms is not None:
            line += f", first token after {self.ttft_ms:.0f} ms"
        if self.tpot_ms is not None:
            line += f", then {self.tpot_ms:.1f} ms per token"
        return line


async def generate(
    stub: nitsum_pb2_grpc.GenerationServiceStub,
    index: int,
    request: nitsum_pb2.GenerateRequest,
    server: str,
    timeout_s: float | None,
    on_delta: Callable[[str, int], None],
) -> CallOutcome:
    """Runs one request to its end; failures of the call are part of the outcome.

    Args:
      stub: of the server.
      index: position of the prompt.
      request: what to send.
      server: address, for messages.
      timeout_s: deadline, or None.
      on_delta: called with text and number of tokens of each delta.
    """
    outcome = CallOutcome(index, begun_s=time.monotonic())
    try:
        async for response in stub.Generate(request, timeout=timeout_s):
            match response.WhichOneof("event"):
                case "started":
                    outcome.started = response.started
                case "delta":
                    _take(outcome, response.delta)
                    on_delta(response.delta.text, len(response.delta.token_ids))
                case "finished":
                    outcome.finished = response.finished
        if outcome.finished is None:
            outcome.failure = Failure("INTERNAL", "the stream ended without its final message", cli.EXIT_FAILED)
    except grpc.aio.AioRpcError as error:
        outcome.failure = Failure.of(error, server)
    return outcome


def _take(outcome: CallOutcome, delta: nitsum_pb2.TokenDelta) -> None:
    outcome.text += delta.text
    outcome.logprobs += delta.logprobs
    outcome.reasoning += delta.reasoning
    for call in delta.tool_calls:
        if call.index == len(outcome.tool_calls):
            outcome.tool_calls.append({"name": call.name, "arguments": ""})
        outcome.tool_calls[call.index]["arguments"] += call.arguments
    if not delta.token_ids:
        return
    outcome.output_ids += delta.token_ids
    outcome.last_s = time.monotonic()
    if outcome.first_s is None:
        outcome.first_s = outcome.last_s


def _logprob(one: nitsum_pb2.TokenLogprob) -> dict[str, Any]:
    top = [{"token_id": other.token_id, "logprob": _rounded(other.logprob)} for other in one.top]
    return {"token_id": one.token_id, "logprob": _rounded(one.logprob), "top": top}


def _reason(finished: nitsum_pb2.Finished) -> str:
    return nitsum_pb2.FinishReason.Name(finished.finish_reason).removeprefix("FINISH_REASON_").lower()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
