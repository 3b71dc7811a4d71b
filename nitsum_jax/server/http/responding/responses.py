"""What /v1/responses answers, for the document and its tests."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ResponseUsage(BaseModel):
    """Tokens."""

    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    """A response; it repeats the fields of its request."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    service_tier: str
    usage: ResponseUsage
