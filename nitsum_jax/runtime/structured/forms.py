"""What an output can be held to, as clients say it."""

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from typing import Any

MAX_FORM_CHARS = 256 * 2**10
MAX_CHOICES = 1024


class FormKind(enum.Enum):
    """In which language a form is written."""

    JSON_SCHEMA = "JSON schema"
    REGEX = "regular expression"
    GRAMMAR = "grammar"


@dataclasses.dataclass(frozen=True, slots=True)
class FormSpec:
    """A form; equal ones are compiled once.

    Attributes:
      kind: language.
      text: the form in it; a schema is JSON.
    """

    kind: FormKind
    text: str


def json_schema(schema: Any) -> FormSpec:
    """Output that is valid by a JSON schema: an object, or true."""
    return FormSpec(FormKind.JSON_SCHEMA, json.dumps(schema))


def json_object() -> FormSpec:
    """Output that is any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> FormSpec:
    """Output that a regular expression matches whole."""
    return FormSpec(FormKind.REGEX, pattern)


def choice(options: Sequence[str]) -> FormSpec:
    """Output that is one of these texts."""
    return FormSpec(FormKind.REGEX, "|".join(f"(?:{re.escape(option)})" for option in options))


def grammar(text: str) -> FormSpec:
    """Output of a grammar: Lark's notation as llguidance has it, or EBNF in that of llama.cpp (GBNF)."""
    if re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        from llguidance.gbnf_to_lark import any_to_lark

        text = any_to_lark(text)
    return FormSpec(FormKind.GRAMMAR, text)
