"""What an output can be held to, as clients say it."""

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from typing import Any

from nitsum_jax.runtime.structured.schemas import supported

MAX_FORM_CHARS = 256 * 2**10
MAX_CHOICES = 1024
# Enough to indent what people indent; without an end, a model that has lost its way writes spaces for ever.
SPACES = r"[\x20\x0A\x0D\x09]{0,20}"


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
    return FormSpec(FormKind.JSON_SCHEMA, json.dumps(supported(schema)))


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
    return FormSpec(FormKind.GRAMMAR, text)


def combined(calls: str | None, body: FormSpec | None, thinking: bool) -> FormSpec:
    """An answer that calls tools, or has a form, or either, perhaps behind the end of a thought.

    Args:
      calls: Lark's rules for calls; the first one is called `answer`.
      body: the form. A grammar of a client has rules of its own: it cannot be combined, and holds from the beginning.
      thinking: whether the answer begins within a thought.
    """
    if body is not None and body.kind is FormKind.GRAMMAR:
        return body
    rules = [calls] if calls is not None else []
    if body is not None:
        if body.kind is FormKind.JSON_SCHEMA:
            rules.append(f"body: %json {json_rule(json.loads(body.text))}")
        else:
            rules.append(f"body: /{_in_lark(body.text)}/")
    if thinking:
        rules.append('thought[suffix="</think>"]: /(?s:.*)/\ngap: /[\\n ]{0,4}/')
    said = " | ".join(name for name, there in (("answer", calls is not None), ("body", body is not None)) if there)
    start = f"start: thought gap said\nsaid: {said}" if thinking else f"start: {said}"
    return FormSpec(FormKind.GRAMMAR, "\n".join([start, *rules]) + "\n")


def json_rule(schema: Any) -> str:
    """A JSON schema as it stands in a rule of a grammar."""
    schema = supported(schema)
    if isinstance(schema, dict):
        return json.dumps({"x-guidance": {"whitespace_pattern": SPACES}, **schema})
    return json.dumps(schema)


def _in_lark(pattern: str) -> str:
    """A regular expression between slashes: they and line breaks are escaped, where they are not already."""
    spelled = {"/": r"\/", "\n": r"\n"}
    return re.sub(r"\\?[/\n]|\\.", lambda found: spelled.get(found[0][-1], found[0]), pattern)
