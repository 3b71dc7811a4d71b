"""How /v1/responses writes an answer: as items, whole or by events."""

import json
from collections.abc import Sequence
from typing import Any

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.runtime.streams.output import Piece, TokenWithLogprob
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part, Said, Thought
from nitsum_jax.server.http.answering import Whole
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.openai.logprobs import TokenBytes, chat_logprobs
from nitsum_jax.server.http.openai.plan import RequestPlan
from nitsum_jax.server.http.responding.requests import ResponseRequest
from nitsum_jax.server.http.translated import PartsWriter


class ResponseShape(PartsWriter):
    """One response; see `answering.WholeWriter` and `EventWriter`."""

    def __init__(self, request: ResponseRequest, plan: RequestPlan, token_bytes: TokenBytes) -> None:
        """Begins.

        Args:
          request: that it answers.
          plan: of one output.
          token_bytes: what a token says.
        """
        super().__init__(plan)
        self._request = request
        self._token_bytes = token_bytes
        self._id = f"resp_{plan.id}"
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._numbers = 0
        self._told: list[TokenWithLogprob] = []

    def opening(self) -> str:
        """The events before the first piece."""
        response = self._response("in_progress", None)
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def events(self, index: int, piece: Piece) -> str:
        """The events that bring a piece."""
        self._told += piece.told
        return super().events(index, piece)

    def closing(self, outputs: Outputs) -> str:
        """The event with the whole response."""
        status = self._status()
        return self._event(f"response.{status}", response=self._response(status, outputs))

    def failure(self, error: ApiError) -> str:
        """The events of an error."""
        detail = json.loads(error.body())["error"]
        failed = self._response("failed", None) | {"error": {"code": "server_error", "message": detail["message"]}}
        said = self._event("error", code=detail["code"], message=detail["message"], param=detail["param"])
        return said + self._event("response.failed", response=failed)

    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]:
        """The response that is no stream."""
        self._take(wholes)
        return self._response(self._status(), outputs)

    def _status(self) -> str:
        return "incomplete" if self._end is not None and self._end.reason is FinishReason.LENGTH else "completed"

    def _event(self, kind: str, **fields: Any) -> str:
        data = {"type": kind, "sequence_number": self._numbers, **fields}
        self._numbers += 1
        return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"

    def _add(self, part: Part) -> str:
        match part:
            case Said(text):
                return self._more("message", text)
            case Thought(text):
                return self._more("reasoning", text)
            case CallBegun(_, name):
                return self._close() + self._begin("function_call", name)
            case CallArguments(_, text):
                item = self._open
                assert item is not None
                item["arguments"] += text
                return self._event(
                    "response.function_call_arguments.delta",
                    item_id=item["id"],
                    output_index=len(self._items) - 1,
                    delta=text,
                )

    def _more(self, kind: str, text: str) -> str:
        events = ""
        if self._open is None or self._open["type"] != kind:
            events = self._close() + self._begin(kind, "")
        item = self._open
        assert item is not None
        item["content"][0]["text"] += text
        where = self._where(item)
        if kind == "message":
            return events + self._event("response.output_text.delta", **where, delta=text, logprobs=[])
        return events + self._event("response.reasoning_text.delta", **where, delta=text)

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _begin(self, kind: str, name: str) -> str:
        number = len(self._items)
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{self._plan.id}_{number}", "type": kind, "status": "in_progress"}
        if kind == "function_call":
            item |= {"call_id": f"call_{self._plan.id}_{number}", "name": name, "arguments": ""}
        elif kind == "message":
            item |= {"role": "assistant", "content": []}
        else:
            item |= {"summary": [], "content": []}
        self._items.append(item)
        self._open = item
        events = self._event("response.output_item.added", output_index=number, item=item)
        if kind == "message":
            item["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            events += self._event("response.content_part.added", **self._where(item), part=item["content"][0])
        elif kind == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": ""}]
            events += self._event("response.content_part.added", **self._where(item), part=item["content"][0])
        return events

    def _close(self) -> str:
        item, self._open = self._open, None
        if item is None:
            return ""
        item["status"] = "completed" if self._end is None or self._end.reason is FinishReason.STOP else "incomplete"
        where, index = self._where(item), len(self._items) - 1
        match item["type"]:
            case "message":
                part = item["content"][0]
                if self._request.top_logprobs is not None:
                    told = chat_logprobs(self._told, self._token_bytes, self._request.top_logprobs)
                    part["logprobs"] = told["content"]
                events = self._event(
                    "response.output_text.done", **where, text=part["text"], logprobs=part["logprobs"]
                ) + self._event("response.content_part.done", **where, part=part)
            case "reasoning":
                part = item["content"][0]
                events = self._event("response.reasoning_text.done", **where, text=part["text"]) + self._event(
                    "response.content_part.done", **where, part=part
                )
            case _:
                events = self._event(
                    "response.function_call_arguments.done",
                    item_id=item["id"],
                    output_index=index,
                    name=item["name"],
                    arguments=item["arguments"],
                )
        return events + self._event("response.output_item.done", output_index=index, item=item)

    def _response(self, status: str, outputs: Outputs | None) -> dict[str, Any]:
        plan = self._plan
        usage = None
        if outputs is not None:
            cached = plan.cached_tokens(outputs.cached_tokens)
            usage = {
                "input_tokens": plan.prompt_tokens,
                "input_tokens_details": {"cached_tokens": cached},
                "output_tokens": outputs.tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": plan.prompt_tokens + outputs.tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": plan.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": plan.model,
            "output": self._items if outputs is not None else [],
            "service_tier": plan.told_tier,
            "usage": usage,
            **self._request.told(),
        }
