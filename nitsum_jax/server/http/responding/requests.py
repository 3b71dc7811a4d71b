"""What /v1/responses takes, and the chat that it stands for."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from nitsum_jax.engine.request import MAX_TOP_LOGPROBS
from nitsum_jax.server.http.fields import MAX_TIER_CHARS, Strict, Unsupported, wrong
from nitsum_jax.server.http.openai.requests import MAX_MESSAGES
from nitsum_jax.server.http.openai.structured import SchemaField
from nitsum_jax.server.http.openai.tooling import MAX_TOOLS, FunctionName

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_STATELESS = "the server keeps no responses: send the whole conversation as input"


def _text_of(content: Any) -> str:
    """The text of a content, which is a string or a list of text parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong("give content as a string, or as a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise wrong(f"parts of type {str(kind)[:40]!r} are not supported: this model reads text only")
    return "\n".join(part["text"] for part in content)


def _message_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """One item of the input as a message of a chat."""
    match item.get("type", "message"):
        case "message":
            role = item.get("role")
            if role not in ("user", "assistant", "system", "developer"):
                raise wrong("give each message a role: user, assistant, system or developer")
            return {"role": role, "content": _text_of(item.get("content"))}
        case "function_call":
            name, arguments, call = item.get("name"), item.get("arguments"), item.get("call_id")
            if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call, str):
                raise wrong("give a function_call its call_id, name and arguments, all strings")
            function = {"name": name, "arguments": arguments}
            calls = [{"id": call, "type": "function", "function": function}]
            return {"role": "assistant", "content": None, "tool_calls": calls}
        case "function_call_output":
            call = item.get("call_id")
            if not isinstance(call, str):
                raise wrong("give a function_call_output its call_id, a string")
            return {"role": "tool", "tool_call_id": call, "content": _text_of(item.get("output"))}
        case "reasoning":
            return {}  # what models thought before is not shown to them again
        case other:
            raise wrong(f"items of type {str(other)[:40]!r} are not supported: give messages and function calls")


def _read_input(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value or len(value) > MAX_MESSAGES:
        raise wrong(f"give a string, or a list of 1 to {MAX_MESSAGES} items")
    messages: list[dict[str, Any]] = []
    for item in value:
        if not isinstance(item, dict):
            raise wrong("give each item as an object")
        message = _message_of(item)
        last = messages[-1] if messages else {}
        if "tool_calls" in message and last.get("role") == "assistant":
            last["tool_calls"] = last.get("tool_calls", []) + message["tool_calls"]  # one turn, as chats have it
        elif message:
            messages.append(message)
    if not messages:
        raise wrong("the input has no message: give at least one")
    return messages


_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(_TEXTS)}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}]}
_ITEM = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "type": {"const": "message"},
                "role": {"enum": ["user", "assistant", "system", "developer"]},
                "content": _CONTENT,
            },
            "required": ["role", "content"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "function_call"},
                "call_id": {"type": "string"},
                "name": {"type": "string"},
                "arguments": {"type": "string"},
            },
            "required": ["type", "call_id", "name", "arguments"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"const": "function_call_output"},
                "call_id": {"type": "string"},
                "output": _CONTENT,
            },
            "required": ["type", "call_id", "output"],
        },
    ]
}
InputField = Annotated[
    list[dict[str, Any]],
    PlainValidator(_read_input),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": _ITEM, "minItems": 1, "maxItems": MAX_MESSAGES}]}
    ),
]


class ResponseTool(Strict):
    """A function; other kinds of tools are not there."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Strict):
    """What the text is held to."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: SchemaField = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> "TextFormat":
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise PydanticCustomError(
                "invalid_value", "give schema with the type json_schema, and only then", {"field": "schema"}
            )
        return self


class TextOptions(Strict):
    """How the text is written."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "verbosity": Unsupported("the length of an answer is limited by max_output_tokens", ("medium",))
    }

    format: TextFormat | None = None


class ReasoningOptions(Strict):
    """How the model thinks: as it does."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "effort": Unsupported("the model thinks as it does"),
        "summary": Unsupported("thoughts are told whole"),
        "generate_summary": Unsupported("thoughts are told whole"),
    }


def _read_choice(value: Any) -> Any:
    if value is None or value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict) and value.get("type") == "function" and isinstance(value.get("name"), str):
        return {"type": "function", "function": {"name": value["name"]}}
    raise wrong('give none, auto, required, or {"type": "function", "name": "..."}')


_CHOSEN = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string", "minLength": 1}},
    "required": ["type", "name"],
}


class ResponseRequest(Strict):
    """POST /v1/responses."""

    harmless: ClassVar[Mapping[str, str]] = {
        "user": "names the caller",
        "safety_identifier": "names the caller",
        "prompt_cache_key": "the prefix cache finds prompts by their tokens",
        "prompt_cache_retention": "the prefix cache keeps what there is room for",
        "include": "what is told is always told",
    }
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "previous_response_id": Unsupported(_STATELESS),
        "conversation": Unsupported(_STATELESS),
        "store": Unsupported(_STATELESS, (False,)),
        "background": Unsupported("responses are made while the client waits", (False,)),
        "truncation": Unsupported("prompts are not cut", ("disabled",)),
        "prompt": Unsupported("templates of prompts are not kept"),
        "max_tool_calls": Unsupported("tools are called by the client"),
    }

    model: str = Field(max_length=4096, description="The id that /v1/models lists.")
    input: InputField
    instructions: str | None = Field(None, description="A message of the system before the input.")
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    stream: bool | None = None
    stream_options: dict[str, Any] | None = Field(None, description="Has no effect.")
    tools: Annotated[list[ResponseTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: Annotated[
        Any,
        PlainValidator(_read_choice),
        WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _CHOSEN]}),
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = Field(None, max_length=MAX_TIER_CHARS, description="As for chats.")

    def chat(self) -> dict[str, Any]:
        """The body of the chat request that it stands for."""
        system = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        tools = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
            for tool in self.tools or ()
        ]
        return {
            "model": self.model,
            "messages": [*system, *self.input],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.top_logprobs is not None,
            "top_logprobs": self.top_logprobs,
            "tools": tools or None,
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "service_tier": self.service_tier,
        }

    def _format(self) -> dict[str, Any] | None:
        form = self.text.format if self.text is not None else None
        if form is None or form.type != "json_schema":
            return None if form is None else {"type": form.type}
        return {"type": "json_schema", "json_schema": {"name": form.name or "answer", "schema": form.schema_}}

    def told(self) -> dict[str, Any]:
        """What the response repeats of it."""
        form = self.text.format if self.text is not None else None
        choice = self.tool_choice
        if isinstance(choice, dict):
            choice = {"type": "function", "name": choice["function"]["name"]}
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tool_choice": choice or "auto",
            "tools": [{"parameters": None, "strict": None, **tool.model_dump()} for tool in self.tools or ()],
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "reasoning": {"effort": None, "summary": None},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "background": False,
        }
