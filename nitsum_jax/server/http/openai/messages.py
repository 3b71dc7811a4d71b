"""One turn of a conversation, as clients of OpenAI's chat send it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from nitsum_jax.runtime.tools.turns import arguments_of, role_of
from nitsum_jax.server.http.fields import ContentField

_Id = Annotated[str, Field(max_length=512)]


class _Open(BaseModel):
    """An object whose unknown keys are passed over: clients send back what they got, with what they noted beside it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class CalledFunction(_Open):
    """A function, and what it was called with."""

    name: _Id
    arguments: str = Field(description="An object, in JSON.")


class ToolCall(_Open):
    """A call that the assistant made."""

    id: _Id | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def rendered(self) -> dict[str, Any]:
        """As templates expect it: the arguments are an object."""
        arguments = arguments_of(self.function.arguments)
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class Message(_Open):
    """One turn of a conversation. An answer of ours is a message, too."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                {"required": ["tool_calls"], "properties": {"tool_calls": {"type": "array", "minItems": 1}}},
            ]
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: ContentField = None
    name: _Id | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: _Id | None = None
    reasoning_content: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _says_something(cls, data: Any) -> Any:
        # What only an assistant may leave out.
        if isinstance(data, dict) and data.get("content") is None and not data.get("tool_calls"):
            raise PydanticCustomError("missing_content", "you must provide {field}", {"field": "content"})
        return data

    def rendered(self) -> dict[str, Any]:
        """As the chat template gets it."""
        turn: dict[str, Any] = {"role": role_of(self.role), "content": self.content}
        for key in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, key)
            if value is not None:
                turn[key] = value
        if self.tool_calls:
            turn["tool_calls"] = [call.rendered() for call in self.tool_calls]
        return turn
