"""What /v1/messages answers, for the document and its tests."""

from typing import Any, Literal

from pydantic import BaseModel


class MessageUsage(BaseModel):
    """Tokens; those of the prompt that were in the cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(BaseModel):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    """How long a prompt is."""

    input_tokens: int


class AnthropicErrorDetail(BaseModel):
    """What is wrong."""

    type: str
    message: str


class AnthropicError(BaseModel):
    """Anthropic's shape of errors."""

    type: Literal["error"]
    error: AnthropicErrorDetail
