"""POST /tokenize and /detokenize, and GET /version, as vLLM has them."""

from typing import Annotated

from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

import nitsum_jax
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import ChatPrompt, Prompt, TextPrompt, encode
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.fields import Strict, TemplateVariables, TokenIdsField
from nitsum_jax.server.http.openai.messages import Message
from nitsum_jax.server.http.openai.requests import MAX_MESSAGES

_Model = Annotated[str | None, Field(max_length=4096, description="The id that /v1/models lists, or none.")]


class TokenizeRequest(Strict):
    """POST /tokenize: a text, or a conversation."""

    model: _Model = None
    prompt: str | None = Field(None, description="This, or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = Field(None, description="Of a text; true if not given.")
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables = None
    return_token_strs: bool | None = Field(None, description="Tell what each token says, too.")

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("invalid_value", "give prompt or messages, one of them", {"field": "prompt"})
        return self

    def read(self) -> Prompt:
        """What is to be tokenized."""
        if self.messages is None:
            return TextPrompt(self.prompt or "", self.add_special_tokens is not False)
        options = ChatOptions(
            variables=self.chat_template_kwargs or {},
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final=bool(self.continue_final_message),
        )
        return ChatPrompt([message.rendered() for message in self.messages], options)


class TokenizeResponse(BaseModel):
    """The tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: _Model = None
    tokens: TokenIdsField


class DetokenizeResponse(BaseModel):
    """What they say as a text of their own; special tokens are spelled."""

    prompt: str


class Version(BaseModel):
    """Of the server."""

    version: str


async def tokenize(request: TokenizeRequest, backend: Backend) -> BaseModel:
    """The tokens of a prompt, as a request for an output would have them."""
    (ids,) = await encode([request.read()], backend.model)
    read = backend.model.tokenizer.token_bytes
    strings = [read(token).decode(errors="replace") for token in ids] if request.return_token_strs else None
    return TokenizeResponse(
        count=len(ids), max_model_len=backend.engine.context_limit(), tokens=list(ids), token_strs=strings
    )


async def detokenize(request: DetokenizeRequest, backend: Backend) -> BaseModel:
    """The text of token ids."""
    size = backend.model.vocab_size
    wrong = next((token for token in request.tokens if token >= size), None)
    if wrong is not None:
        raise ApiError(400, f"there is no token {wrong}: ids go from 0 to {size - 1}", param="tokens")
    return DetokenizeResponse(prompt=backend.model.tokenizer.decode(request.tokens, skip_special=False))


def version() -> Version:
    """That of the package."""
    return Version(version=nitsum_jax.__version__)
