"""Flags, and keys of a .jsonl prompts file, that hold outputs to forms and let chats call tools."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.proto import nitsum_pb2

FORM_KEYS = ("json_schema", "json_object", "regex", "choice", "grammar")
CHAT_KEYS = ("tools", "tool_choice", "template_variables")


def define(values: flags.FlagValues) -> None:
    """Adds the flags."""
    text = flags.DEFINE_string
    text("json_schema", None, "the output is held to this JSON schema; @FILE reads it from a file", flag_values=values)
    flags.DEFINE_bool("json_object", False, "the output is held to be a JSON object", flag_values=values)
    text("regex", None, "the output is held to match this regular expression whole", flag_values=values)
    flags.DEFINE_multi_string(
        "choice", [], "the output is held to be one of these texts; any number of them", flag_values=values
    )
    text("grammar", None, "the output is held to this grammar (Lark or GBNF); @FILE reads it", flag_values=values)
    text(
        "tools",
        None,
        "with --chat: functions that the model may call, a JSON list in OpenAI's form; @FILE reads it from a file",
        flag_values=values,
    )
    text("tool_choice", None, "auto, none, required, or the name of the function to be called", flag_values=values)
    text(
        "template_variables",
        None,
        'with --chat: variables of the chat template, in JSON, such as {"enable_thinking": false}',
        flag_values=values,
    )


def form_of(values: flags.FlagValues, entry: Mapping[str, Any]) -> nitsum_pb2.OutputForm | None:
    """The form of one request: that of its line, else that of the flags.

    Raises:
      InvalidInputError: several are given.
    """
    given = {key: entry[key] for key in FORM_KEYS if entry.get(key)}
    if not given:
        given = {key: _read(values[key].value, key) for key in FORM_KEYS if values[key].value}
    if len(given) > 1:
        raise InvalidInputError(f"an output is held to one form, and {', '.join(given)} give several: give one")
    for key, value in given.items():
        match key:
            case "choice":
                return nitsum_pb2.OutputForm(choice=nitsum_pb2.Choices(options=value))
            case "json_schema":
                return nitsum_pb2.OutputForm(json_schema=value if isinstance(value, str) else json.dumps(value))
            case _:
                return nitsum_pb2.OutputForm(**{key: value})
    return None


def chat_of(
    values: flags.FlagValues, entry: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]
) -> nitsum_pb2.ChatPrompt:
    """A conversation, with the tools of its line or of the flags.

    Raises:
      InvalidInputError: something in it is malformed.
    """

    def given(key: str) -> Any:
        return entry[key] if entry.get(key) is not None else _parsed(_read(values[key].value, key), key)

    choice = entry.get("tool_choice") or values["tool_choice"].value or ""
    variables = given("template_variables")
    return nitsum_pb2.ChatPrompt(
        messages=[_message(message) for message in messages],
        tools=[_tool(tool) for tool in _listed(given("tools"))],
        tool_choice=choice if choice in ("", "auto", "none", "required") else f"={choice}",
        template_variables="" if variables is None else json.dumps(variables),
    )


def _read(value: Any, key: str) -> Any:
    """What a flag says, or the file that it names."""
    if key not in ("json_schema", "grammar", *CHAT_KEYS) or not isinstance(value, str) or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidInputError(f"--{key}={value} cannot be read: {why}") from None


def _parsed(value: str | None, key: str) -> Any:
    try:
        return None if value is None else json.loads(value)
    except ValueError as error:
        raise InvalidInputError(f"--{key} is not JSON: {error}") from None


def _listed(value: Any) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise InvalidInputError("tools must be a list in OpenAI's form")
    return value or []


def _tool(given: Any) -> nitsum_pb2.Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidInputError(
            'a tool must be like {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'
        )
    parameters = function.get("parameters")
    return nitsum_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters="" if parameters is None else json.dumps(parameters),
    )


def _message(given: Mapping[str, Any]) -> nitsum_pb2.ChatMessage:
    """A message in OpenAI's form, or with the names of the fields of ChatMessage."""
    fields = {key: value for key, value in given.items() if value is not None}
    fields["tool_calls"] = [_call(call) for call in _listed(fields.get("tool_calls"))]
    if isinstance(fields.get("content"), list):
        fields["content"] = "\n".join(_part(part) for part in fields["content"])
    if "reasoning_content" in fields:
        fields["reasoning"] = fields.pop("reasoning_content")
    return nitsum_pb2.ChatMessage(**fields)


def _part(given: Any) -> str:
    if not isinstance(given, Mapping) or given.get("type") != "text" or not isinstance(given.get("text"), str):
        raise InvalidInputError('a part of a message must be like {"type": "text", "text": "hello"}')
    return given["text"]


def _call(given: Any) -> nitsum_pb2.ToolCall:
    function = given.get("function", given) if isinstance(given, Mapping) else {}
    if not isinstance(function.get("name"), str):
        raise InvalidInputError('a tool call must be like {"function": {"name": "f", "arguments": "{}"}}')
    arguments = function.get("arguments") or ""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return nitsum_pb2.ToolCall(id=given.get("id") or "", name=function["name"], arguments=text)
