"""POST /tokenize and /detokenize, and GET /version, as vLLM has them."""

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.types import Receive, Scope, Send

import nitsum_jax
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.calls import ChatPrompt, Prompt, TextPrompt, encode
from nitsum_jax.server.http.body import read_object
from nitsum_jax.server.http.errors import ApiError, of_validation
from nitsum_jax.server.http.fields import Strict, TemplateVariables, TokenIdsField
from nitsum_jax.server.http.openai.messages import Message
from nitsum_jax.server.http.openai.requests import MAX_MESSAGES
from nitsum_jax.server.state import ServerState

_Request = TypeVar("_Request", bound=Strict)
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


class JsonEndpoint:
    """Answers one object with another, without the engine; an ASGI application."""

    def __init__(self, state: ServerState, kind: type[_Request], answer: Any) -> None:
        """Answers requests of a kind.

        Args:
          state: of the server.
          kind: of the requests.
          answer: coroutine function of the request and the backend.
        """
        self._state = state
        self._kind = kind
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        self._state.present()
        request = await read_object(scope, receive, self._checked)
        backend = self._state.present()
        check_model(getattr(request, "model", None), backend.model)
        body = json.dumps((await self._answer(request, backend)).model_dump()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _checked(self, data: dict[str, Any]) -> Strict:
        try:
            return self._kind.model_validate(data)
        except ValidationError as error:
            raise of_validation(error) from None


def check_model(asked: str | None, model: ServedModel) -> None:
    """Refuses a request for another model than the one that is served."""
    if asked is not None and asked != model.name:
        message = f"The model `{asked[:80]}` does not exist: this server has `{model.name}`"
        raise ApiError(404, message, param="model", code="model_not_found")
