"""Fields of OpenAI's requests that pydantic's own types do not describe, each with its JSON schema beside its check.

Every check raises on the first thing that is wrong: a body of megabytes must not make megabytes of error messages.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from nitsum_jax.engine.request import MAX_LOGIT_BIAS
from nitsum_jax.runtime.calls import (
    MAX_OUTPUTS,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
    Prompt,
    TextPrompt,
    TokenPrompt,
)

MAX_TIER_CHARS = 64
MAX_BIAS = 100

UNKNOWN, UNSUPPORTED = "unknown_parameter", "unsupported_parameter"

TOKEN_ID = "x-nitsum-token-id"
"""Marks the schema of a token id; the served document puts the size of the vocabulary there (see openapi.py)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unsupported:
    """A field of OpenAI's that is known and not supported.

    Attributes:
      why: what is said when it is used.
      accepted: a value that means the same as leaving it out, beside null; None: there is no such value.
      schema: of these values, if `accepted` alone does not describe them.
    """

    why: str
    accepted: tuple[Any, ...] = ()
    schema: Mapping[str, Any] | None = None

    def means_nothing(self, value: Any) -> bool:
        """Whether the value asks for nothing."""
        return value is None or any(_kind(value) is _kind(other) and value == other for other in self.accepted)

    def json_schema(self) -> dict[str, Any]:
        """Of the values that ask for nothing."""
        enough = {"enum": [*self.accepted, None]}
        return {**(self.schema or enough), "description": f"Not supported: {self.why}."}


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)  # 1 and 1.0 are one number in JSON; true is none


class Strict(BaseModel):
    """A JSON object with known fields and no conversion of types."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}
    """Fields that are taken and have no effect, whatever they hold; name to reason."""

    @staticmethod
    def _describe(schema: dict[str, Any], model: type["Strict"]) -> None:
        schema["additionalProperties"] = False
        for name, field in model.unsupported.items():
            schema["properties"][name] = field.json_schema()
        for name, why in model.harmless.items():
            schema["properties"][name] = {"description": f"Has no effect: {why}."}

    # Not extra="forbid": that makes one error per unknown field.
    model_config = ConfigDict(strict=True, allow_inf_nan=False, hide_input_in_errors=True, json_schema_extra=_describe)

    @classmethod
    @functools.cache
    def names(cls) -> frozenset[str]:
        """Names of the fields that say something."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for key, value in data.items():
            if key in cls.names() or key in cls.harmless:
                continue
            if key not in cls.unsupported:
                raise PydanticCustomError(UNKNOWN, "Unrecognized request argument supplied: {field}", {"field": key})
            if not cls.unsupported[key].means_nothing(value):
                message = "{field} is not supported: {why}"
                raise PydanticCustomError(UNSUPPORTED, message, {"field": key, "why": cls.unsupported[key].why})
        return data


def wrong(message: str) -> PydanticCustomError:
    """What a check raises about its field; see wording.py."""
    return PydanticCustomError("invalid_value", message)


def _token_ids(values: list[Any], what: str) -> list[int]:
    # Exactly int: a bool is one, too, in Python.
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise wrong(f"{what} holds something that is not a token id: give whole numbers from 0 on")
    return values


def _read_prompt(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [_text(value)]
    if not isinstance(value, list) or not value:
        raise wrong("give a string, a list of strings, a list of token ids, or a list of lists of token ids")
    kind = type(value[0])
    if kind is int:
        return [TokenPrompt(_token_ids(value, "the prompt"))]
    if len(value) > MAX_OUTPUTS:
        raise wrong(f"{len(value)} prompts are too many: give at most {MAX_OUTPUTS}")
    if not all(type(item) is kind for item in value):
        raise wrong("the prompts are of different types: give only strings, or only lists of token ids")
    if kind is str:
        return [_text(item) for item in value]
    if kind is list:
        if not all(value):
            raise wrong("a prompt is empty: give at least one token")
        return [TokenPrompt(_token_ids(item, "a prompt")) for item in value]
    raise wrong("give a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _text(value: str) -> TextPrompt:
    if not value:
        raise wrong("a prompt is empty: give at least one token")
    return TextPrompt(value)


def _read_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value if value is not None else []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise wrong("give a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise wrong(f"{len(stops)} stop strings are too many: give at most {MAX_STOPS}")
    if not all(1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise wrong(f"a stop string is empty or too long: give each 1 to {MAX_STOP_CHARS} characters")
    return stops


def _read_stop_ids(value: Any) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise wrong("give a list of token ids")
    if len(value) > MAX_STOP_IDS:
        raise wrong(f"{len(value)} ids are too many: give at most {MAX_STOP_IDS}")
    return _token_ids(value, "the list")


def _read_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not value:
        raise wrong("give a list of token ids, at least one")
    return _token_ids(value, "the list")


def _read_bias(value: Any) -> list[tuple[int, float]]:
    if value is None:
        return []
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"give an object of at most {MAX_LOGIT_BIAS} token ids, each with a number")
    pairs: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise wrong(f"{key[:20]!r} is not a token id: the keys are ids, written as strings of digits")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise wrong(f"the bias of token {key} is not a number from -{MAX_BIAS} to {MAX_BIAS}")
        if int(key) in pairs:
            raise wrong(f"token {int(key)} is named twice")
        pairs[int(key)] = float(bias)
    return list(pairs.items())


def _read_content(value: Any) -> str | list[dict[str, str]] | None:
    if isinstance(value, str) or value is None:
        return value
    if not isinstance(value, list) or not value:
        raise wrong("give a string, or a list of text parts")
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise wrong('give each part a type; only {"type": "text", "text": "..."} is supported')
        if part["type"] != "text":
            raise wrong(f"parts of type {part['type'][:40]!r} are not supported: this model reads text only")
        if not isinstance(part.get("text"), str):
            raise wrong('give a text part as {"type": "text", "text": "..."}')
    # What else stands in a part, such as cache_control, asks for nothing that changes an answer.
    return [{"type": "text", "text": part["text"]} for part in value]


_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


def _read_variables(value: dict[str, Any] | None) -> dict[str, Any] | None:
    for name in value or ():
        if name in _OURS:
            raise wrong(f"{name} is no variable to be set: use the field of the request")
    return value


_ID = {"type": "integer", "minimum": 0, TOKEN_ID: True}
_IDS = {"type": "array", "items": _ID, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_NULL = {"type": "null"}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}

PromptField = Annotated[
    list[Any],
    PlainValidator(_read_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_OUTPUTS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_OUTPUTS},
            ],
            "description": "One text or several, or the same as token ids.",
        }
    ),
]
StopField = Annotated[
    list[str],
    PlainValidator(_read_stop),
    WithJsonSchema(
        {
            "anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}, _NULL],
            "description": "The output ends before the first of these that it would contain.",
        }
    ),
]
StopIdsField = Annotated[
    list[int],
    PlainValidator(_read_stop_ids),
    WithJsonSchema(
        {
            "anyOf": [{"type": "array", "items": _ID, "maxItems": MAX_STOP_IDS}, _NULL],
            "description": "The output ends before any of these ids, beside the end-of-sequence ids of the model.",
        }
    ),
]
BiasField = Annotated[
    list[tuple[int, float]],
    PlainValidator(_read_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
                    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
                    "maxProperties": MAX_LOGIT_BIAS,
                },
                _NULL,
            ],
            "description": "Added to the logits of tokens, whose ids are the keys.",
        }
    ),
]
TokenIdsField = Annotated[
    list[int],
    PlainValidator(_read_ids),
    WithJsonSchema({"type": "array", "items": _ID, "minItems": 1}),
]
TemplateVariables = Annotated[
    dict[str, Any] | None,
    AfterValidator(_read_variables),
    WithJsonSchema({"anyOf": [{"type": "object", "propertyNames": {"not": {"enum": sorted(_OURS)}}}, _NULL]}),
]
ContentField = Annotated[
    str | list[dict[str, str]] | None,
    PlainValidator(_read_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART, "minItems": 1}, _NULL]}),
]
