"""JSON schemas in words that llguidance knows: what it would refuse becomes an equal or a stricter schema, if one is.

Whatever is left, llguidance refuses by name; nothing is passed over that could make an output invalid.
"""

from typing import Any, Final

_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "dependentSchemas", "$dynamicRef")
# What stands in place of a schema, rather than in place of a value.
_SCHEMAS = ("additionalProperties", "items", "not", "if", "then", "else", "contains", "propertyNames")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_POINTER = r"(/([^~/]|~[01])*)*"
_PATH = r"[A-Za-z0-9/._~=&+-]*"
# Formats of JSON Schema as narrower ones, or as patterns.
_NARROWER: Final = {"idn-email": "email", "idn-hostname": "hostname", "iri": "uri"}
_PATTERNS: Final = {
    "json-pointer": f"^{_POINTER}$",
    "relative-json-pointer": f"^(0|[1-9][0-9]*)(#|{_POINTER})$",
    **dict.fromkeys(("uri-reference", "iri-reference", "uri-template"), rf"^{_PATH}(\?{_PATH})?(#{_PATH})?$"),
}
_KNOWN: Final = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "regex")
)
_NEVER: Final[dict[str, Any]] = {"enum": []}


def supported(schema: Any) -> Any:
    """A schema as llguidance knows it; what is no schema stays as it is.

    Args:
      schema: an object of JSON, or whether any value is valid.
    """
    match schema:
        case True:
            return {}
        case False:
            return _NEVER
        case dict():
            return _inner(_unevaluated(_property_names(_format(_counts(schema)))))
        case _:
            return schema


def _inner(schema: dict[str, Any]) -> dict[str, Any]:
    """The same with the schemas within it; true and false are known there."""

    def within(part: Any) -> Any:
        return part if isinstance(part, bool) else supported(part)

    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _SCHEMAS:
            made[key] = within(value)
        elif key in _LISTS and isinstance(value, list):
            made[key] = [within(part) for part in value]
        elif key in _MAPS and isinstance(value, dict):
            made[key] = {name: within(part) for name, part in value.items()}
        else:
            made[key] = value
    return made


def _counts(schema: dict[str, Any]) -> dict[str, Any]:
    """2.0 counts as 2."""
    whole = {k: int(v) for k in _COUNTS if isinstance(v := schema.get(k), float) and v.is_integer()}
    return {**schema, **whole}


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    """A narrower format; one that JSON Schema does not have, such as OpenAPI's "password", says nothing to it."""
    name = schema.get("format")
    if not isinstance(name, str) or name in _KNOWN:
        return schema
    rest = {key: value for key, value in schema.items() if key != "format"}
    if name in _NARROWER:
        return {**rest, "format": _NARROWER[name]}
    if name in _PATTERNS:
        return schema if "pattern" in schema else {**rest, "pattern": _PATTERNS[name]}
    return rest


def _property_names(schema: dict[str, Any]) -> dict[str, Any]:
    """Names from a list, or by a pattern, as properties of their own."""
    names, rest = schema.get("propertyNames"), {k: v for k, v in schema.items() if k != "propertyNames"}
    if not isinstance(names, dict) or "patternProperties" in schema or schema.get("properties"):
        return schema
    told = {key: value for key, value in names.items() if key not in ("type", "title", "description")}
    values = schema.get("additionalProperties", True)
    listed = told.get("enum", [told["const"]] if "const" in told else None)
    if len(told) == 1 and isinstance(listed, list):
        named = {name: values for name in listed if isinstance(name, str)}
        return {**rest, "properties": named, "additionalProperties": False}
    if len(told) == 1 and isinstance(told.get("pattern"), str):
        return {**rest, "patternProperties": {told["pattern"]: values}, "additionalProperties": False}
    return rest if not told else schema


def _unevaluated(schema: dict[str, Any]) -> dict[str, Any]:
    """Where nothing else looks at properties, those that are not evaluated are the additional ones."""
    if "unevaluatedProperties" not in schema or any(key in schema for key in _APPLICATORS):
        return schema
    rest = {key: value for key, value in schema.items() if key != "unevaluatedProperties"}
    return {"additionalProperties": schema["unevaluatedProperties"], **rest}
