"""The OpenAPI document, made from the models that check the requests."""

import copy
import functools
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nitsum_jax.runtime.backend import Backend
from nitsum_jax.server.gateway import HEADER_PARAMETERS
from nitsum_jax.server.http import tokens
from nitsum_jax.server.http.anthropic.requests import CountRequest, MessagesRequest
from nitsum_jax.server.http.anthropic.responses import AnthropicError, MessageObject, TokenCount
from nitsum_jax.server.http.fields import TOKEN_ID
from nitsum_jax.server.http.openai import requests, responses
from nitsum_jax.server.http.openai.embeddings import EmbeddingRequest
from nitsum_jax.server.http.openai.tiers import accepted
from nitsum_jax.server.http.responding.requests import ResponseRequest
from nitsum_jax.server.http.responding.responses import ResponseObject

_REF = "#/components/schemas/{model}"
_MODELS = (
    requests.ChatRequest,
    requests.CompletionRequest,
    tokens.TokenizeRequest,
    tokens.DetokenizeRequest,
    tokens.TokenizeResponse,
    tokens.DetokenizeResponse,
    tokens.Version,
    ResponseRequest,
    MessagesRequest,
    CountRequest,
    ResponseObject,
    MessageObject,
    TokenCount,
    AnthropicError,
    responses.ChatResponse,
    responses.CompletionResponse,
    EmbeddingRequest,
    responses.EmbeddingResponse,
    responses.ModelList,
    responses.Model,
    responses.Health,
    responses.ErrorResponse,
)
_ERRORS = {
    400: "The request is wrong, or not possible on this model.",
    401: "A key is needed, or the one given is not known.",
    403: "The key does not allow it.",
    404: "There is no such model.",
    405: "Another method is needed; the header allow names it.",
    408: "The body took too long to come.",
    413: "The body is too long.",
    415: "The body is not JSON.",
    429: "The queue is full, or the key has used up its rate; retry-after says when to try again.",
    431: "The headers are too long.",
    500: "A fault in the server.",
    503: "The server is starting or stopping.",
}
_ID_HEADER = {"x-request-id": {"description": "That of the request, or one made.", "schema": {"type": "string"}}}
_RETRY_HEADERS = {"retry-after": {"description": "Seconds.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}


def openapi(backend: Backend | None) -> dict[str, Any]:
    """The document; once the model is there, it names its id, its tiers and the range of its token ids."""
    document = copy.deepcopy(_document())
    if backend is not None:
        schemas = document["components"]["schemas"]
        tiers = [*accepted(backend.engine.tier_names), None]
        for schema in schemas.values():
            fields = schema.get("properties", {})
            if "model" in fields and schema.get("title", "").endswith("Request"):
                known = [backend.model.name] if "model" in schema.get("required", ()) else [backend.model.name, None]
                fields["model"] = {"enum": known, "description": fields["model"].get("description", "")}
            if "service_tier" in fields and schema.get("title", "").endswith("Request"):
                fields["service_tier"] = {"enum": tiers, "description": fields["service_tier"]["description"]}
        _limit_ids(schemas, backend.model.vocab_size - 1)
        model = next(p for p in document["paths"] if "{model}" in p)
        document["paths"][model]["get"]["parameters"][0]["example"] = backend.model.name
    return document


def _limit_ids(schema: Any, last: int) -> None:
    """Gives every schema of a token id its maximum."""
    if isinstance(schema, list):
        for item in schema:
            _limit_ids(item, last)
    elif isinstance(schema, dict):
        if schema.pop(TOKEN_ID, False):
            schema["maximum"] = last
        for item in schema.values():
            _limit_ids(item, last)


@functools.cache
def _document() -> dict[str, Any]:
    _, defined = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nitsum-jax",
            "version": "1",
            "description": "OpenAI-compatible API of one nitsum-jax server.",
        },
        "paths": {
            "/v1/chat/completions": {
                "post": _generation("Answers a conversation.", requests.ChatRequest, responses.ChatResponse)
            },
            "/v1/completions": {
                "post": _generation("Continues texts.", requests.CompletionRequest, responses.CompletionResponse)
            },
            "/v1/embeddings": {
                "post": {
                    **_plain("Vectors of texts.", EmbeddingRequest, responses.EmbeddingResponse),
                    "parameters": list(HEADER_PARAMETERS),
                }
            },
            "/v1/responses": {"post": _generation("Answers, statelessly.", ResponseRequest, ResponseObject)},
            "/v1/messages": {
                "post": _generation("Answers a conversation.", MessagesRequest, MessageObject, AnthropicError)
            },
            "/v1/messages/count_tokens": {
                "post": _plain("The tokens of a conversation.", CountRequest, TokenCount, AnthropicError)
            },
            "/tokenize": {
                "post": _plain(
                    "The tokens of a text or a conversation.", tokens.TokenizeRequest, tokens.TokenizeResponse
                )
            },
            "/detokenize": {"post": _plain("The text of tokens.", tokens.DetokenizeRequest, tokens.DetokenizeResponse)},
            "/version": {"get": _read("The version of the server.", tokens.Version, (401, 403, 429, 503))},
            "/v1/models": {"get": _read("The model that is served.", responses.ModelList, (401, 403, 429, 503))},
            "/v1/models/{model}": {
                "get": {
                    **_read("The model, if it is the one that is served.", responses.Model, (401, 403, 404, 429, 503)),
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                }
            },
            "/health/live": {"get": _read("The process runs.", responses.Health, ())},
            "/health/ready": {
                "get": _read("Whether requests are taken.", responses.Health, ())
                | {"responses": {**_ok(responses.Health), "503": _answer("Starting or draining.", responses.Health)}}
            },
        },
        "components": {"schemas": defined["$defs"]},
    }


def _generation(
    summary: str, request: type[BaseModel], response: type[BaseModel], error: type[BaseModel] = responses.ErrorResponse
) -> dict[str, Any]:
    good = _ok(response)
    # Of each event, as the tools that read this document take it.
    event = {
        "type": "object",
        "properties": {"data": {"type": "string", "description": "A chunk in JSON; [DONE] in the last event."}},
        "required": ["data"],
    }
    good["200"]["content"]["text/event-stream"] = {"schema": event}
    return {
        "summary": summary,
        "parameters": list(HEADER_PARAMETERS),
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {**good, **_refusals(tuple(_ERRORS), error)},
    }


def _plain(
    summary: str, request: type[BaseModel], response: type[BaseModel], error: type[BaseModel] = responses.ErrorResponse
) -> dict[str, Any]:
    refusals = _refusals(tuple(_ERRORS), error)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _json(request)},
        "responses": {**_ok(response), **refusals},
    }


def _read(summary: str, response: type[BaseModel], errors: tuple[int, ...]) -> dict[str, Any]:
    return {"summary": summary, "responses": {**_ok(response), **_refusals((*errors, 405, 431, 500))}}


def _ok(response: type[BaseModel]) -> dict[str, Any]:
    return {"200": _answer("Done.", response)}


def _refusals(codes: tuple[int, ...], error: type[BaseModel] = responses.ErrorResponse) -> dict[str, Any]:
    found = {str(code): _answer(_ERRORS[code], error) for code in sorted(codes)}
    for code in found.keys() & {"429", "503"}:
        found[code]["headers"] = {**_ID_HEADER, **_RETRY_HEADERS}
    return found


def _answer(description: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"description": description, "headers": dict(_ID_HEADER), "content": _json(model)}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}
