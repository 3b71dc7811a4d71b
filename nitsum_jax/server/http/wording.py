"""What pydantic finds wrong with a request, in words for those who sent it."""

from collections.abc import Mapping
from typing import Any

_WORDS: Mapping[str, str] = {
    "missing": "you must provide {param}",
    "missing_content": "you must provide {param}",
    "greater_than": "{param} must be greater than {gt}",
    "greater_than_equal": "{param} must be at least {ge}",
    "less_than": "{param} must be less than {lt}",
    "less_than_equal": "{param} must be at most {le}",
    "int_type": "{param} must be a whole number",
    "int_from_float": "{param} must be a whole number",
    "int_parsing_size": "{param} is beyond all numbers that are taken here",
    "float_type": "{param} must be a number",
    "finite_number": "{param} must be a number that is not infinite",
    "bool_type": "{param} must be true or false",
    "string_type": "{param} must be a string",
    "string_too_long": "{param} is too long: send at most {max_length} characters",
    "string_too_short": "{param} is too short: send at least {min_length} characters",
    "string_pattern_mismatch": "{param} holds characters that are not allowed: it must match {pattern}",
    "list_type": "{param} must be a list",
    "too_long": "{param} has too many entries: send at most {max_length}",
    "too_short": "{param} has too few entries: send at least {min_length}",
    "dict_type": "{param} must be an object",
    "model_type": "{param} must be an object",
    "model_attributes_type": "{param} must be an object",
    "literal_error": "{param} must be {expected}",
    "enum": "{param} must be {expected}",
    "string_unicode": "{param} is not valid Unicode: send UTF-8",
    "union_tag_not_found": "{param} needs the key {discriminator}",
    "union_tag_invalid": "{param} has an unknown {discriminator}: it must be {expected_tags}",
}
"""Kind of finding to message; its names are those of pydantic's context, and the path of the field."""


def told(kind: str, param: str, message: str, context: Mapping[str, Any]) -> str:
    """The message for one finding.

    Args:
      kind: of the finding.
      param: path of the field; "" for the body itself.
      message: what the check itself said, if it is one of ours.
      context: of the finding.
    """
    name = param or "the body"
    if kind in _WORDS:
        return _WORDS[kind].format(param=name, **{key: _plain(value) for key, value in context.items()})
    if "field" in context or not param:
        return message
    return f"{param}: {message[:1].lower()}{message[1:]}"


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value
