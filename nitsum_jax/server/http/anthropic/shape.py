"""How /v1/messages writes an answer: as blocks, whole or by events."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic_core import from_json

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part, Said, Thought
from nitsum_jax.server.http.answering import Whole
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.openai.plan import RequestPlan
from nitsum_jax.server.http.translated import PartsWriter


class MessageShape(PartsWriter):
    """One message; see `answering.WholeWriter` and `EventWriter`."""

    def __init__(self, plan: RequestPlan) -> None:
        """Begins the answer of a plan for one output."""
        super().__init__(plan)
        self._blocks: list[dict[str, Any]] = []
        self._open = False
        self._arguments = ""

    def opening(self) -> str:
        """The event before the first piece."""
        usage = {
            "input_tokens": self._plan.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        return _event("message_start", message=self._message([], usage))

    def closing(self, outputs: Outputs) -> str:
        """The events at the end."""
        return _event("message_delta", delta=self._stopped(), usage=self._usage(outputs)) + _event("message_stop")

    def failure(self, error: ApiError) -> str:
        """The event of an error, on which clients raise."""
        return f"event: error\ndata: {error.anthropic_body().decode()}\n\n"

    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]:
        """The message that is no stream."""
        self._take(wholes)
        return self._message(self._blocks, self._usage(outputs)) | self._stopped()

    def _usage(self, outputs: Outputs) -> dict[str, Any]:
        cached = self._plan.cached_tokens(outputs.cached_tokens)
        return {
            "input_tokens": self._plan.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": outputs.tokens,
        }

    def _stopped(self) -> dict[str, str | None]:
        return {"stop_reason": self._reason(), "stop_sequence": None if self._end is None else self._end.stop}

    def _reason(self) -> str | None:
        if self._end is None:
            return None
        if self._end.stop is not None:
            return "stop_sequence"
        if self._end.reason is FinishReason.LENGTH:
            return "max_tokens"
        return "tool_use" if self._reader.calls else "end_turn"

    def _message(self, blocks: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._plan.id}",
            "type": "message",
            "role": "assistant",
            "model": self._plan.model,
            "content": blocks,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _add(self, part: Part) -> str:
        match part:
            case Said(text):
                return self._more("text", "text", "text_delta", text)
            case Thought(text):
                return self._more("thinking", "thinking", "thinking_delta", text)
            case CallBegun(index, name):
                use = {"type": "tool_use", "id": f"toolu_{self._plan.id}_{index}", "name": name, "input": {}}
                return self._close() + self._begin(use)
            case CallArguments(_, text):
                self._arguments += text
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _more(self, kind: str, key: str, delta: str, text: str) -> str:
        events = ""
        if not self._open or self._blocks[-1]["type"] != kind:
            block = {"type": kind, key: ""} | ({"signature": ""} if kind == "thinking" else {})
            events = self._close() + self._begin(block)
        self._blocks[-1][key] += text
        return events + self._delta({"type": delta, key: text})

    def _begin(self, block: dict[str, Any]) -> str:
        self._blocks.append(block)
        self._open, self._arguments = True, ""
        return _event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _close(self) -> str:
        if not self._open:
            return ""
        self._open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            try:
                block["input"] = from_json(self._arguments or "{}", allow_inf_nan=False)
            except ValueError:  # cut by max_tokens
                block["input"] = {}
        return _event("content_block_stop", index=len(self._blocks) - 1)


def _event(kind: str, **fields: Any) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, separators=(',', ':'))}\n\n"
