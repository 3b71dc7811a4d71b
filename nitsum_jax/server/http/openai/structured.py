"""The fields by which clients of OpenAI, vLLM, SGLang and llama.cpp hold an output to a form."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError, from_json

from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.forms import MAX_CHOICES, MAX_FORM_CHARS, FormSpec
from nitsum_jax.server.http.fields import Strict, Unsupported, wrong

_Text = Annotated[str, Field(min_length=1, max_length=MAX_FORM_CHARS)]
_Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES)]


def _read_schema(value: Any) -> dict[str, Any] | bool | None:
    if isinstance(value, str):
        try:
            value = from_json(value)
        except ValueError as error:
            raise PydanticCustomError(
                "invalid_value", "the schema is not valid JSON: {why}", {"why": str(error)}
            ) from None
    if value is not None and not isinstance(value, dict | bool):
        raise wrong("give a JSON schema: an object, or one as a string")
    return value


SchemaField = Annotated[
    dict[str, Any] | bool | None,
    PlainValidator(_read_schema),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "null"}], "description": "A JSON schema."}),
]


class NamedSchema(Strict):
    """OpenAI's json_schema."""

    name: str = Field(max_length=512)
    description: str | None = None
    strict: bool | None = Field(None, description="The output is held to the schema either way.")
    schema_: SchemaField = Field(None, alias="schema")


class ResponseFormat(Strict):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError(
                "invalid_value", "give json_schema with the type json_schema, and only then", {"field": "json_schema"}
            )
        return self

    def spec(self) -> FormSpec | None:
        """The form; None for plain text."""
        if self.json_schema is not None:
            schema = self.json_schema.schema_
            return forms.json_schema({} if schema is None else schema)
        return forms.json_object() if self.type == "json_object" else None


class StructuredOutputs(Strict):
    """vLLM's structured_outputs."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "structural_tag": Unsupported("use tools, or a grammar"),
        "whitespace_pattern": Unsupported("between the parts of JSON, up to 20 white characters are allowed"),
        "disable_fallback": Unsupported("there is nothing to fall back to", (False, True)),
        "disable_any_whitespace": Unsupported("use a grammar", (False,)),
        "disable_additional_properties": Unsupported("use additionalProperties in the schema", (False,)),
    }

    json_: SchemaField = Field(None, alias="json")
    json_object: bool | None = None
    regex: _Text | None = None
    choice: _Choices | None = None
    grammar: _Text | None = Field(None, description="Lark, as llguidance has it, or GBNF.")

    def specs(self) -> list[FormSpec]:
        """All forms that are given."""
        return _specs(self.json_, self.json_object, self.regex, self.choice, self.grammar)


class HeldToForm(Strict):
    """The fields of a request; at most one of them says something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaField = Field(None)
    guided_regex: _Text | None = None
    guided_choice: _Choices | None = None
    guided_grammar: _Text | None = None
    json_schema: SchemaField = Field(None)
    regex: _Text | None = None
    ebnf: _Text | None = None
    grammar: _Text | None = Field(None, description="Lark, as llguidance has it, or GBNF.")

    @model_validator(mode="after")
    def _is_one_form(self) -> "HeldToForm":
        if len(self._given()) > 1:
            names = ", ".join(dict.fromkeys(name for name, _ in self._given()))
            raise PydanticCustomError(
                "invalid_value",
                "an output is held to one form, and {names} give several: give one",
                {"field": self._given()[1][0], "names": names},
            )
        return self

    def form(self) -> tuple[str, FormSpec] | None:
        """The form that the output is held to, with the name of its field; None: it is free."""
        given = self._given()
        return given[0] if given else None

    def _given(self) -> list[tuple[str, FormSpec]]:
        plain = self.response_format.spec() if self.response_format is not None else None
        by_name: dict[str, list[FormSpec]] = {
            "response_format": [plain] if plain is not None else [],
            "structured_outputs": self.structured_outputs.specs() if self.structured_outputs is not None else [],
            "guided_json": _specs(json_=self.guided_json),
            "guided_regex": _specs(regex=self.guided_regex),
            "guided_choice": _specs(choice=self.guided_choice),
            "guided_grammar": _specs(grammar=self.guided_grammar),
            "json_schema": _specs(json_=self.json_schema),
            "regex": _specs(regex=self.regex),
            "ebnf": _specs(grammar=self.ebnf),
            "grammar": _specs(grammar=self.grammar),
        }
        return [(name, spec) for name, specs in by_name.items() for spec in specs]


def _specs(
    json_: dict[str, Any] | bool | None = None,
    json_object: bool | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[FormSpec]:
    found = []
    if json_ is not None:
        found.append(forms.json_schema(json_))
    if json_object:
        found.append(forms.json_object())
    if regex is not None:
        found.append(forms.regex(regex))
    if choice is not None:
        found.append(forms.choice(choice))
    if grammar is not None:
        found.append(forms.grammar(grammar))
    return found
