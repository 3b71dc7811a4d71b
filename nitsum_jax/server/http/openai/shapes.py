"""Outputs as OpenAI's two APIs write them, whole or as server-sent events.

What all events of a stream have in common is written once, when the stream begins; an event then costs little more
than the escaping of its text.
"""

import abc
import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import Any

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.runtime.streams.output import End, Piece, TokenWithLogprob
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.runtime.tools.parts import Answer, CallArguments, CallBegun, Part, Said, Thought
from nitsum_jax.server.http.answering import Whole
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.openai.logprobs import (
    Echo,
    TokenBytes,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from nitsum_jax.server.http.openai.plan import RequestPlan

DONE = "data: [DONE]\n\n"
FINGERPRINT = "nitsum-jax"


class StreamedUsage(enum.Enum):
    """Where a stream tells its usage."""

    NOWHERE = enum.auto()
    AT_THE_END = enum.auto()  # and null before
    EVERYWHERE = enum.auto()


class AnswerShape(abc.ABC):
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
            f'"finish_reason":"{self._reason(index, piece.end)}","stop_reason":{stop}}}]}}\n\n'
        )

    def _before(self, index: int) -> str:
        """The events before the first piece of an output."""
        del index
        return ""

    def _reason(self, index: int, end: End) -> str:
        """Why an output ended, in the words of the API."""
        del index
        return str(end.reason)

    def opening(self) -> str:
        """The events before the first piece of all."""
        return ""

    def closing(self, outputs: Outputs) -> str:
        """The events at the end: the usage, if it is wanted."""
        if self._usage_in_chunks is StreamedUsage.NOWHERE:
            return DONE
        usage = json.dumps(self._usage(outputs), separators=(",", ":"))
        return f'{self._usage_head},"choices":[],"usage":{usage}}}\n\n{DONE}'

    def failure(self, error: ApiError) -> str:
        """The event of an error; OpenAI's client raises on it."""
        return f"data: {error.body().decode()}\n\n{DONE}"

    def whole(self, wholes: Sequence[Whole], outputs: Outputs) -> dict[str, Any]:
        """The response that is no stream."""
        choices = [
            {
                "index": index,
                **self._content(index, "".join(output.texts)),
                "logprobs": self._all_told(index, output.told, outputs) if self._logprobs is not None else None,
                "finish_reason": None if output.end is None else self._reason(index, output.end),
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

    @abc.abstractmethod
    def _said(self, text: str) -> str:
        """The part of an event's choice that brings text (quoted), or none at the end."""

    @abc.abstractmethod
    def _content(self, index: int, text: str) -> Mapping[str, Any]:
        """The part of a whole choice that is the text."""

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

    @abc.abstractmethod
    def _told(self, index: int, told: Sequence[TokenWithLogprob]) -> Mapping[str, Any]:
        """The log probabilities of a piece."""


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

    def __init__(self, plan: RequestPlan, token_bytes: TokenBytes, logprobs: int | None, usage: StreamedUsage) -> None:
        """See AnswerShape."""
        super().__init__(plan, token_bytes, logprobs, usage)
        self._readers = [plan.reader() for _ in plan.calls] if plan.reader is not None else []

    def opening(self) -> str:
        """An event per answer that says whose turn it is."""
        role = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        return "".join(f"{self._head}{index},{role}" for index in range(len(self._plan.calls)))

    def events(self, index: int, piece: Piece) -> str:
        """The events that bring a piece of an answer, taken apart if it is more than text."""
        if not self._readers:
            return super().events(index, piece)
        reader = self._readers[index]
        parts = reader.push(piece.text) + (reader.finish() if piece.end is not None else [])
        logprobs = "null"
        if self._logprobs is not None and piece.told:
            logprobs = json.dumps(self._told(index, piece.told), separators=(",", ":"))
        said = ""
        for delta in [self._delta(index, part) for part in parts] or (["{}"] if piece.told else []):
            said += f'{self._head}{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":null}}]}}\n\n'
            logprobs = "null"
        return said + super().events(index, Piece("", (), (), piece.end))

    def _delta(self, index: int, part: Part) -> str:
        match part:
            case Said(text):
                return f'{{"content":{quoted(text)}}}'
            case Thought(text):
                return f'{{"reasoning_content":{quoted(text)}}}'
            case CallBegun(number, name):
                call = {"index": number, **_call(self._plan, index, number, name, "")}
                return json.dumps({"tool_calls": [call]}, separators=(",", ":"))
            case CallArguments(number, text):
                return f'{{"tool_calls":[{{"index":{number},"function":{{"arguments":{quoted(text)}}}}}]}}'

    def _reason(self, index: int, end: End) -> str:
        called = bool(self._readers) and self._readers[index].calls > 0
        return "tool_calls" if called and end.reason is FinishReason.STOP else str(end.reason)

    def _said(self, text: str) -> str:
        return f'"delta":{{"content":{text}}}' if text else '"delta":{}'

    def _content(self, index: int, text: str) -> Mapping[str, Any]:
        if not self._readers:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        reader = self._readers[index]
        answer = Answer.of(reader.push(text) + reader.finish())
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.thought:
            message["reasoning_content"] = answer.thought
        if answer.calls:
            calls = [
                _call(self._plan, index, number, name, arguments)
                for number, (name, arguments) in enumerate(answer.calls)
            ]
            message |= {"content": answer.text or None, "tool_calls": calls}
        return {"message": message}

    def _told(self, index: int, told: Sequence[TokenWithLogprob]) -> Mapping[str, Any]:
        return chat_logprobs(told, self._token_bytes, self._logprobs or 0)


def _call(plan: RequestPlan, index: int, number: int, name: str, arguments: str) -> dict[str, Any]:
    """A call, with an id of its own: Mistral's templates want nine letters and digits."""
    digest = hashlib.sha256(f"{plan.id}-{index}-{number}".encode()).hexdigest()[:9]
    return {"id": digest, "type": "function", "function": {"name": name, "arguments": arguments}}
