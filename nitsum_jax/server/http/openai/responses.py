"""The responses, as pydantic models: they describe them in /openapi.json, and hold the tests to it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class PromptTokensDetails(_Exact):
    """What is to be known of the tokens of prompts."""

    cached_tokens: int


class Usage(_Exact):
    """Tokens of prompts and outputs."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Exact):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token that was chosen, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Exact):
    """An entry per token."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(_Exact):
    """Four lists with an element per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(_Exact):
    """How likely a token of a prompt was."""

    logprob: float
    rank: int | None
    decoded_token: str


class CalledFunctionAnswer(_Exact):
    """A function, and its arguments in JSON."""

    name: str
    arguments: str


class ToolCallAnswer(_Exact):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: CalledFunctionAnswer


class AnswerMessage(_Exact):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallAnswer] = []


class _Choice(_Exact):
    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] = []


class ChatChoice(_Choice):
    """One of n answers."""

    message: AnswerMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(_Choice):
    """One of n outputs of a prompt."""

    text: str
    logprobs: CompletionLogprobs | None


class _Response(_Exact):
    id: str
    created: int
    model: str
    service_tier: str
    system_fingerprint: str
    usage: Usage


class ChatResponse(_Response):
    """An answer that is no stream."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionResponse(_Response):
    """Outputs that are no stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class EmbeddingObject(_Exact):
    """The vector of a text."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Exact):
    """Tokens of all texts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(_Exact):
    """The vectors, in the order of the texts."""

    object: Literal["list"]
    data: list[EmbeddingObject]
    model: str
    usage: EmbeddingUsage


class Model(_Exact):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Exact):
    """All models: one."""

    object: Literal["list"]
    data: list[Model]


class Health(_Exact):
    """Where the server stands."""

    status: Literal["live", "ready", "starting", "draining"]


class ErrorDetail(_Exact):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Exact):
    """OpenAI's shape of errors."""

    error: ErrorDetail
