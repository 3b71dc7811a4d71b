"""What /v1/messages takes, and the chat that it stands for."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from nitsum_jax.runtime.calls import MAX_STOP_CHARS, MAX_STOPS
from nitsum_jax.server.http.fields import MAX_TIER_CHARS, Strict, Unsupported, wrong
from nitsum_jax.server.http.openai.requests import MAX_MESSAGES
from nitsum_jax.server.http.openai.tooling import MAX_TOOLS, FunctionName


def _blocks(content: Any) -> list[dict[str, Any]]:
    """A content as a list of blocks, each an object with a type."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise wrong("give content as a string, or as a list of blocks")
    for block in content:
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise wrong("give each block as an object with a type")
        if block["type"] == "text" and not isinstance(block.get("text"), str):
            raise wrong('give a text block as {"type": "text", "text": "..."}')
    return content


def _text_of(content: Any) -> str:
    blocks = _blocks(content)
    other = next((block["type"] for block in blocks if block["type"] != "text"), None)
    if other is not None:
        raise wrong(f"blocks of type {other[:40]!r} are not supported here: this model reads text only")
    return "\n".join(block["text"] for block in blocks)


def _assistant(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts, calls, thoughts = [], [], []
    for block in blocks:
        match block["type"]:
            case "text":
                texts.append(block["text"])
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                pass
            case "tool_use":
                name, given, call = block.get("name"), block.get("input"), block.get("id")
                if not isinstance(name, str) or not isinstance(given, dict) or not isinstance(call, str):
                    raise wrong("give a tool_use its id, name and input")
                calls.append(
                    {"id": call, "type": "function", "function": {"name": name, "arguments": json.dumps(given)}}
                )
            case other:
                raise wrong(f"blocks of type {other[:40]!r} are not supported: this model reads text only")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) if texts or not calls else None}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    return message


def _user(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    texts = []
    for block in blocks:
        match block["type"]:
            case "text":
                texts.append(block["text"])
            case "tool_result":
                call = block.get("tool_use_id")
                if not isinstance(call, str):
                    raise wrong("give a tool_result its tool_use_id")
                content = block.get("content")
                messages.append(
                    {"role": "tool", "tool_call_id": call, "content": "" if content is None else _text_of(content)}
                )
            case other:
                raise wrong(f"blocks of type {other[:40]!r} are not supported: this model reads text only")
    if texts or not messages:
        messages.append({"role": "user", "content": "\n".join(texts)})
    return messages


def _read_messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise wrong(f"give a list of 1 to {MAX_MESSAGES} messages")
    messages: list[dict[str, Any]] = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ("user", "assistant"):
            raise wrong("give each message a role, user or assistant, and a content")
        blocks = _blocks(turn.get("content"))
        messages += [_assistant(blocks)] if turn["role"] == "assistant" else _user(blocks)
    return messages


def _read_system(value: Any) -> str | None:
    return None if value is None else _text_of(value)


def _read_choice(value: Any) -> Any:
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("auto", "any", "none") or (kind == "tool" and isinstance(value.get("name"), str)):
        return value
    raise wrong('give {"type": "auto"}, any, none, or {"type": "tool", "name": "..."}')


_TEXT = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT}]}
_USE = {
    "type": "object",
    "properties": {
        "type": {"const": "tool_use"},
        "id": {"type": "string"},
        "name": {"type": "string"},
        "input": {"type": "object"},
    },
    "required": ["type", "id", "name", "input"],
}
_RESULT = {
    "type": "object",
    "properties": {"type": {"const": "tool_result"}, "tool_use_id": {"type": "string"}, "content": _TEXTS},
    "required": ["type", "tool_use_id"],
}


def _turn(role: str, *blocks: Mapping[str, Any]) -> dict[str, Any]:
    content = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": list(blocks)}}]}
    return {
        "type": "object",
        "properties": {"role": {"const": role}, "content": content},
        "required": ["role", "content"],
    }


_CHOICE = {
    "anyOf": [
        {"type": "null"},
        {"type": "object", "properties": {"type": {"enum": ["auto", "any", "none"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {"type": {"const": "tool"}, "name": {"type": "string"}},
            "required": ["type", "name"],
        },
    ]
}
MessagesField = Annotated[
    list[dict[str, Any]],
    PlainValidator(_read_messages),
    WithJsonSchema(
        {
            "type": "array",
            "items": {"anyOf": [_turn("user", _TEXT, _RESULT), _turn("assistant", _TEXT, _USE)]},
            "minItems": 1,
            "maxItems": MAX_MESSAGES,
        }
    ),
]


class ClientTool(Strict):
    """A tool that the client runs; those that Anthropic runs are not there."""

    harmless: ClassVar[Mapping[str, str]] = {"cache_control": "the prefix cache finds prompts by their tokens"}

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class Thinking(Strict):
    """Whether the model thinks first: told to its chat template as enable_thinking."""

    harmless: ClassVar[Mapping[str, str]] = {"display": "thoughts are told whole"}

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, description="Has no effect: thoughts count as output tokens.")


class CountRequest(Strict):
    """POST /v1/messages/count_tokens."""

    harmless: ClassVar[Mapping[str, str]] = {"cache_control": "the prefix cache finds prompts by their tokens"}
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "mcp_servers": Unsupported("the server calls no tools", ([],)),
        "context_management": Unsupported("conversations are not cut"),
        "output_format": Unsupported("use /v1/chat/completions with response_format"),
        "output_config": Unsupported("use /v1/chat/completions with response_format", ({},)),
    }

    model: str = Field(max_length=4096, description="The id that /v1/models lists.")
    messages: MessagesField
    system: Annotated[
        str | None, PlainValidator(_read_system), WithJsonSchema({"anyOf": [*_TEXTS["anyOf"], {"type": "null"}]})
    ] = None
    tools: Annotated[list[ClientTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: Annotated[Any, PlainValidator(_read_choice), WithJsonSchema(_CHOICE)] = None
    thinking: Thinking | None = None

    def chat(self) -> dict[str, Any]:
        """The body of the chat request that it stands for."""
        system = [] if not self.system else [{"role": "system", "content": self.system}]
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "parameters": tool.input_schema,
                    **({} if tool.description is None else {"description": tool.description}),
                },
            }
            for tool in self.tools or ()
        ]
        choice = self.tool_choice or {}
        named = {"type": "function", "function": {"name": choice.get("name")}}
        last = self.messages[-1]
        return {
            "model": self.model,
            "messages": [*system, *self.messages],
            "tools": tools or None,
            "tool_choice": {"any": "required", "none": "none", "tool": named}.get(choice.get("type", "")),
            "parallel_tool_calls": False if choice.get("disable_parallel_tool_use") else None,
            "continue_final_message": last["role"] == "assistant" and "tool_calls" not in last,
            "chat_template_kwargs": (
                None if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}
            ),
        }


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **CountRequest.unsupported,
        "container": Unsupported("the server runs no code"),
    }

    max_tokens: int = Field(ge=1, le=2**31 - 1, description="Most new tokens.")
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]] | None, Field(max_length=MAX_STOPS)
    ] = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = Field(None, description="Has no effect.")
    service_tier: str | None = Field(
        None, max_length=MAX_TIER_CHARS, description="As for chats; standard_only is the default."
    )

    def chat(self) -> dict[str, Any]:
        """The body of the chat request that it stands for."""
        return {
            **super().chat(),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "service_tier": None if self.service_tier == "standard_only" else self.service_tier,
        }
