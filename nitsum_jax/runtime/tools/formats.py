"""How models write calls of tools: the tags around them, and the grammars that force them."""

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from nitsum_jax.runtime.structured.forms import json_rule


class ToolFormat(enum.Enum):
    """A family of models."""

    HERMES = "hermes"  # Hermes, Qwen: <tool_call>{"name": ..., "arguments": ...}</tool_call>
    LLAMA3 = "llama3"  # {"name": ..., "parameters": ...} is the whole answer
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": ...}]
    MISTRAL_ARGS = "mistral_args"  # since 2025: [TOOL_CALLS]name[ARGS]{...}


BEGIN: Mapping[ToolFormat, str] = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.MISTRAL_ARGS: "[TOOL_CALLS]",
}
"""What stands before a call."""

END = "</tool_call>"
ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
THINK, THOUGHT = "<think>", "</think>"
TAGS = frozenset({*BEGIN.values(), END, ARGS, CALL_ID, THINK, THOUGHT})
"""Tokens that structure an answer; where they are special, they are read all the same."""


class SpellsTags(Protocol):
    """The part of a tokenizer that grammars need."""

    # ruff: noqa: D102
    @property
    def special_ids(self) -> frozenset[int]: ...
    def encode(self, text: str, add_special: bool = True) -> list[int]: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Tool:
    """A function that a model may call.

    Attributes:
      name: of the function.
      parameters: JSON schema of its arguments, an object.
    """

    name: str
    parameters: Mapping[str, Any]


def format_of(template: str | None) -> ToolFormat | None:
    """The format that a chat template teaches its model; None if there is none."""
    if template is None or "tools" not in template:
        return None
    if BEGIN[ToolFormat.HERMES] in template:
        return ToolFormat.HERMES
    if BEGIN[ToolFormat.MISTRAL] in template:
        return ToolFormat.MISTRAL_ARGS if ARGS in template else ToolFormat.MISTRAL
    if BEGIN[ToolFormat.LLAMA3] in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return ToolFormat.LLAMA3
    return None


def thinks(template: str | None) -> bool:
    """Whether a chat template knows thoughts in <think> tags."""
    return template is not None and THOUGHT in template


def call_grammar(form: ToolFormat, tools: Sequence[Tool], *, parallel: bool, tokenizer: SpellsTags) -> str:
    """A grammar in Lark's notation: one call of these tools, or several if `parallel`.

    The rule `answer` is the whole.
    """

    def tag(text: str) -> str:
        ids = tokenizer.encode(text, add_special=False)
        return f"<[{ids[0]}]>" if len(ids) == 1 and ids[0] in tokenizer.special_ids else json.dumps(text)

    key = "parameters" if form is ToolFormat.LLAMA3 else "arguments"
    root = "/items" if form is ToolFormat.MISTRAL else ""
    places = [root] if len(tools) == 1 else [f"{root}/anyOf/{number}" for number in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, key: _moved(tool.parameters, f"{place}/properties/{key}")},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    one = calls[0] if len(calls) == 1 else {"anyOf": calls}
    match form:
        case ToolFormat.HERMES:
            begin, end = tag(BEGIN[form]), tag(END)
            more = ' ("\\n" call)*' if parallel else ""
            return f'answer: call{more}\ncall: {begin} "\\n" object "\\n" {end}\nobject: %json {json_rule(one)}\n'
        case ToolFormat.LLAMA3:
            return f"answer: %json {json_rule(one)}\n"
        case ToolFormat.MISTRAL:
            array = {"type": "array", "items": one, "minItems": 1} | ({} if parallel else {"maxItems": 1})
            return f"answer: {tag(BEGIN[form])} array\narray: %json {json_rule(array)}\n"
        case ToolFormat.MISTRAL_ARGS:
            rules = [
                f"call_{number}: {tag(BEGIN[form])} {json.dumps(tool.name)} {tag(ARGS)} args_{number}\n"
                f"args_{number}: %json {json_rule(tool.parameters)}\n"
                for number, tool in enumerate(tools)
            ]
            choice = " | ".join(f"call_{number}" for number in range(len(tools)))
            return f"answer: call{'+' if parallel else ''}\ncall: {choice}\n{''.join(rules)}"


def _moved(schema: Any, place: str) -> Any:
    """A schema as it stands within another one, at a place to which its references to itself then lead."""
    match schema:
        case {"$id": _}:  # its references begin there, wherever it stands
            return schema
        case dict():
            return {
                key: f"#{place}{value[1:]}" if key == "$ref" and _is_pointer(value) else _moved(value, place)
                for key, value in schema.items()
            }
        case list():
            return [_moved(value, place) for value in schema]
        case _:
            return schema


def _is_pointer(value: Any) -> bool:
    return isinstance(value, str) and (value == "#" or value.startswith("#/"))
