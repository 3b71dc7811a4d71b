"""Schemas that llguidance would refuse, and that are held all the same; and those that stay refused."""

import json
import random
from typing import Any

import jsonschema
import pytest

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.schemas import supported
from nitsum_jax.runtime.tools.formats import Tool, ToolFormat, call_grammar
from tests.runtime.structured.test_compiler import COMPILERS, WRAPPED, said

NAMES = {"propertyNames": {"enum": ["red", "green"]}, "additionalProperties": {"type": "boolean"}}
HELD: dict[str, Any] = {
    "true": True,
    "counts": {"type": "array", "minItems": 1.0, "maxItems": 2.0, "items": {"type": "string", "maxLength": 3.0}},
    "listed names": {"type": "object", **NAMES},
    "one name": {"type": "object", "propertyNames": {"const": "a"}, "additionalProperties": {"type": "null"}},
    "names by a pattern": {
        "type": "object",
        "propertyNames": {"pattern": "^[ab]{1,2}$", "type": "string"},
        "additionalProperties": {"type": "integer"},
        "maxProperties": 2,
    },
    "no others": {"type": "object", "properties": {"a": {"type": "null"}}, "unevaluatedProperties": False},
    "within": {
        "type": "object",
        "properties": {"items": {"$ref": "#/$defs/x"}, "format": {"const": "password"}},
        "required": ["items", "format"],
        "additionalProperties": False,
        "$defs": {"x": {"anyOf": [{"type": "object", **NAMES, "minProperties": 1}]}},
    },
    "password": {"type": "string", "format": "password", "maxLength": 5},
    **{
        name: {"type": "string", "format": name, **({"maxLength": 30} if "pointer" not in name else {})}
        for name in ("idn-email", "idn-hostname", "iri", "json-pointer", "relative-json-pointer")
    },
    "uri-reference": {"type": "string", "format": "uri-reference", "maxLength": 30},
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_said_is_valid(name: str) -> None:
    schema = HELD[name]
    form = COMPILERS["byte_level"].compile(forms.json_schema(schema))
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for seed in range(8):
        text = said(form, WRAPPED["byte_level"], random.Random(seed), most=150)
        if text is not None:
            validator.validate(json.loads(text))
    assert supported(supported(schema)) == supported(schema)


@pytest.mark.parametrize(
    ("schema", "what"),
    [
        (False, "Unsatisfiable"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "null"}}, "not"),
        ({"type": "string", "format": "regex"}, "regex"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "object", "propertyNames": {"enum": ["a"], "pattern": "b"}}, "propertyNames"),
        ({"allOf": [{"type": "object"}], "unevaluatedProperties": False}, "unevaluatedProperties"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(schema: Any, what: str) -> None:
    with pytest.raises(InvalidInputError, match=what):
        COMPILERS["byte_level"].compile(forms.json_schema(schema))


def test_arguments_of_tools_are_held_likewise() -> None:
    tool = Tool("paint", {"type": "object", **NAMES, "minProperties": 1})
    rules = call_grammar(ToolFormat.LLAMA3, [tool], parallel=False, tokenizer=WRAPPED["byte_level"])
    form = COMPILERS["byte_level"].compile(forms.combined(rules, None, thinking=False))
    text = said(form, WRAPPED["byte_level"], random.Random(1))
    assert text is not None
    jsonschema.validate(json.loads(text)["parameters"], dict(tool.parameters))
