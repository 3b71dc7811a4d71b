"""Messages of a chat in OpenAI's form, as chat templates expect them."""

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from nitsum_jax.errors import InvalidInputError


def role_of(role: str) -> str:
    """As templates know it: "developer" is OpenAI's newer word for "system"."""
    return "system" if role == "developer" else role


def arguments_of(text: str) -> Any:
    """The arguments of a call, which templates expect as an object; as they came if they are no JSON."""
    try:
        return from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        return text


def read_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """One turn of a conversation.

    Raises:
      InvalidInputError: it has no role, says nothing, or is malformed otherwise.
    """
    turn = {key: value for key, value in message.items() if value is not None}
    calls, content = turn.get("tool_calls"), turn.get("content")
    if not isinstance(turn.get("role"), str) or not turn["role"]:
        raise InvalidInputError('every chat message needs a role, such as "user"')
    if not isinstance(content, str | list) and (content is not None or not calls):
        raise InvalidInputError("every chat message needs content: a text, a list of text parts, or tool_calls")
    turn["role"] = role_of(turn["role"])
    turn["content"] = content
    if calls:
        turn["tool_calls"] = [_call(call) for call in calls]
    return turn


def _call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidInputError('a tool call must be like {"function": {"name": "f", "arguments": "{}"}}')
    arguments = function.get("arguments") or {}
    read = arguments_of(arguments) if isinstance(arguments, str) else arguments
    return {"type": "function", **call, "function": {**function, "arguments": read}}
