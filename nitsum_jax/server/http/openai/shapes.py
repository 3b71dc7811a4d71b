"""Outputs as OpenAI's two APIs write them, whole or as server-sent events.

What all events of a stream have in common is written once, when the stream begins; an event then costs little more
than the escaping of its text.
"""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from nitsum_jax.runtime.streams.output import End, Piece, TokenWithLogprob
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.server.http.openai.logprobs import (
    Echo,
    TokenBytes,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from nitsum_jax.server.http.openai.plan import RequestPlan

DONE = b"data: [DONE]\n\n"
FINGERPRINT = "nitsum-jax"


class StreamedUsage(enum.Enum):
    """Where a stream tells its usage."""

    NOWHERE = enum.auto()
    AT_THE_END = enum.auto()  # and null before
    EVERYWHERE = enum.auto()


@dataclasses.dataclass(slots=True)
class Whole:
    """An output that is collected before it is sent."""

    texts: list[str] = dataclasses.field(default_factory=list)
    told: list[TokenWithLogprob] = dataclasses.field(default_factory=list)
    end: End | None = None

    def add(self, piece: Piece) -> None:
        """Takes the next piece."""
        self.texts.append(piece.text)
        self.told += piece.told
        self.end = piece.end


class AnswerShape:
    """How one API writes the outputs of one request."""

    chunk_object: str
    whole_object: str

    def __init__(self, plan: RequestPlan, token_bytes: TokenBytes, logprobs: int | None, usage: StreamedUsage) -> None:
        """Begins a response.

        Args:
          plan: of the request.
          token_bytes: what a token says.
          logprobs: None, or how many of the likeliest tokens are told beside each token.
          usage: where a stream has its usage.
        """
        self._plan = plan
        self._token_bytes = token_bytes
        self._logprobs = logprobs
        shared = json.dumps(self._shared(self.chunk_object), separators=(",", ":"))[:-1]
        self._usage_head = f"data: {shared}"
        self._usage_in_chunks = usage
        self._outputs: Outputs | None = None
        self._head = self._head_with("null")

    def note(self, outputs: Outputs) -> None:
        """Looks at the outputs as they are now, before their next events are asked for."""
        self._outputs = outputs
        if self._usage_in_chunks is StreamedUsage.EVERYWHERE:
            self._head = self._head_with(json.dumps(self._usage(outputs), separators=(",", ":")))

    def _head_with(self, usage: str) -> str:
        told = "" if self._usage_in_chunks is StreamedUsage.NOWHERE else f',"usage":{usage}'
        return f'{self._usage_head}{told},"choices":[{{"index":'

    def events(self, index: int, piece: Piece) -> str:
        """The events that bring a piece of an output."""
        said = self._before(index) if piece.text or piece.told or piece.end is not None else ""
        if piece.text or piece.told:
            logprobs = (
                json.dumps(self._told(index, piece.told), separators=(",", ":"))
                if self._logprobs is not None
                else "null"
            )
            said += (
                f"{self._head}{index},{self._said(quoted(piece.text))},"
                f'"logprobs":{logprobs},"finish_reason":null}}]}}\n\n'
            )
        if piece.end is None:
            return said
        stop = "null" if piece.end.stop is None else quoted(piece.end.stop)
        return (
            f'{said}{self._head}{index},{self._said("")},"logprobs":null,'
            f'"finish_reason":"{piece.end.reason}","stop_reason":{stop}}}]}}\n\n'
        )

    def _before(self, index: int) -> str:
        """The events before the first piece of an output."""
        del index
        return ""

    def opening(self) -> str:
        """The events before the first piece of all."""
        return ""

    def usage_event(self, outputs: Outputs) -> str:
        """The event with the usage."""
        usage = json.dumps(self._usage(outputs), separators=(",", ":"))
        return f'{self._usage_head},"choices":[],"usage":{usage}}}\n\n'

    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]:
        """The response that is no stream."""
        choices = [
            {
                "index": index,
                **self._content(index, "".join(output.texts)),
                "logprobs": self._all_told(index, output.told, outputs) if self._logprobs is not None else None,
                "finish_reason": None if output.end is None else output.end.reason,
                "stop_reason": None if output.end is None else output.end.stop,
                **self._of_prompt(index, outputs),
            }
            for index, output in enumerate(wholes)
        ]
        return {**self._shared(self.whole_object), "choices": choices, "usage": self._usage(outputs)}

    def _shared(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._plan.id,
            "object": kind,
            "created": self._plan.created,
            "model": self._plan.model,
            "service_tier": self._plan.told_tier,
            "system_fingerprint": FINGERPRINT,
        }

    def _usage(self, outputs: Outputs) -> dict[str, Any]:
        prompt = self._plan.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": outputs.tokens,
            "total_tokens": prompt + outputs.tokens,
            "prompt_tokens_details": {"cached_tokens": self._plan.cached_tokens(outputs.cached_tokens)},
        }

    def _said(self, text: str) -> str:
        """The part of an event's choice that brings text (quoted), or none at the end."""
        raise NotImplementedError

    def _content(self, index: int, text: str) -> Mapping[str, Any]:
        """The part of a whole choice that is the text."""
        raise NotImplementedError

    def _all_told(self, index: int, told: Sequence[TokenWithLogprob], outputs: Outputs) -> Mapping[str, Any]:
        """The log probabilities of a whole choice."""
        del outputs
        return self._told(index, told)

    def _of_prompt(self, index: int, outputs: Outputs) -> Mapping[str, Any]:
        """What is told of the prompt of a choice."""
        top = self._plan.prompt_logprobs
        if top is None:
            return {}
        ids = self._plan.calls[index].prompt_ids
        return {"prompt_logprobs": prompt_logprobs(ids, outputs.prompt_logprobs(index), self._token_bytes, top)}

    def _told(self, index: int, told: Sequence[TokenWithLogprob]) -> Mapping[str, Any]:
        raise NotImplementedError


class CompletionShape(AnswerShape):
    """/v1/completions."""

    chunk_object = whole_object = "text_completion"

    def __init__(self, plan: RequestPlan, token_bytes: TokenBytes, logprobs: int | None, usage: StreamedUsage) -> None:
        """See AnswerShape."""
        super().__init__(plan, token_bytes, logprobs, usage)
        self._unechoed = set(range(len(plan.calls))) if plan.echoes else set()

    def _before(self, index: int) -> str:
        if index not in self._unechoed or self._outputs is None:
            return ""
        self._unechoed.remove(index)
        echo = self._echo(index)
        logprobs = "null"
        if self._logprobs is not None:
            told = echoed_logprobs(echo, self._outputs.prompt_logprobs(index), self._token_bytes)
            logprobs = json.dumps(told, separators=(",", ":"))
        return (
            f'{self._head}{index},{self._said(quoted(echo.text))},"logprobs":{logprobs},"finish_reason":null}}]}}\n\n'
        )

    def _echo(self, index: int) -> Echo:
        return self._plan.echoes[index // self._plan.outputs]

    def _said(self, text: str) -> str:
        return f'"text":{text or quoted("")}'

    def _content(self, index: int, text: str) -> Mapping[str, Any]:
        return {"text": self._echo(index).text + text if self._plan.echoes else text}

    def _told(self, index: int, told: Sequence[TokenWithLogprob]) -> Mapping[str, Any]:
        start = len(self._echo(index).text) if self._plan.echoes else 0
        return completion_logprobs(told, self._token_bytes, self._logprobs or 0, start)

    def _all_told(self, index: int, told: Sequence[TokenWithLogprob], outputs: Outputs) -> Mapping[str, Any]:
        then = self._told(index, told)
        if not self._plan.echoes:
            return then
        first = echoed_logprobs(self._echo(index), outputs.prompt_logprobs(index), self._token_bytes)
        return {key: [*first[key], *then[key]] for key in first}


class ChatShape(AnswerShape):
    """/v1/chat/completions."""

    chunk_object, whole_object = "chat.completion.chunk", "chat.completion"

    def opening(self) -> str:
        """An event per answer that says whose turn it is."""
        role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return "".join(f"{self._head}{index},{role}" for index in range(len(self._plan.calls)))

    def _said(self, text: str) -> str:
        return f'"delta":{{"content":{text}}}' if text else '"delta":{}'

    def _content(self, index: int, text: str) -> Mapping[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _told(self, index: int, told: Sequence[TokenWithLogprob]) -> Mapping[str, Any]:
        return chat_logprobs(told, self._token_bytes, self._logprobs or 0)
