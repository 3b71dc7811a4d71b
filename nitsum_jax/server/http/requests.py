"""The requests of OpenAI's API that are served, as pydantic models.

The names, types and defaults are OpenAI's; fields beyond its API are named as vLLM names them. What is known to OpenAI
and not supported here is listed with the reason, so that a client that sends it is told so.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from nitsum_jax.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.runtime.calls import MAX_OUTPUTS
from nitsum_jax.server.http.fields import (
    MAX_TIER_CHARS,
    BiasField,
    ContentField,
    PromptField,
    StopField,
    StopIdsField,
    Strict,
    Unsupported,
)

MAX_MESSAGES = 4096
_MAX_INT32, _MAX_INT64 = 2**31 - 1, 2**63 - 1
_SEEDS = 2**32
_SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

_NO_TOOLS = Unsupported(
    "the model answers with text, and calls no tools",
    ([],),
    {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "null"}]},
)
_NO_CHOICE = Unsupported(_NO_TOOLS.why, ("none", "auto"))
_TEXT_ONLY = Unsupported("the model reads and writes text only")

_Count = Annotated[int, Field(ge=1, le=_MAX_INT32)]
_Id = Annotated[str, Field(max_length=512)]


class StreamOptions(Strict):
    """What a stream carries beside the output."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "include_obfuscation": Unsupported("streams are not padded", (False,))
    }

    include_usage: bool | None = Field(None, description="A last chunk without choices tells the usage.")


class Generation(Strict):
    """What completions and chat have in common."""

    model: str = Field(max_length=4096, description="The id that /v1/models lists.")
    temperature: float | None = Field(
        None, ge=0, le=100, description="0 is greedy. If not given, the model's own; 1 if it has none."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32, description="Keep the k likeliest tokens; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: BiasField = Field([])
    seed: int | None = Field(None, ge=-_MAX_INT64 - 1, le=_MAX_INT64, description="Taken modulo 2^32.")
    max_tokens: _Count | None = Field(None, description="Most new tokens.")
    min_tokens: int | None = Field(None, ge=0, le=_MAX_INT32, description="Nothing ends the output before.")
    stop: StopField = Field([])
    stop_token_ids: StopIdsField = Field([])
    ignore_eos: bool | None = None
    n: int | None = Field(None, ge=1, le=MAX_OUTPUTS, description="Outputs per prompt; 1 if not given.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = Field(
        None,
        max_length=MAX_TIER_CHARS,
        description="Name of a latency tier, or OpenAI's auto, default, flex, priority.",
    )
    user: _Id | None = Field(None, description="Accepted; has no effect.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; has no effect.")

    @model_validator(mode="after")
    def _options_belong_to_streams(self) -> "Generation":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options needs stream: set stream to true, or leave it out",
                {"field": "stream_options"},
            )
        return self

    def sampling(self, vocab_size: int, defaults: GenerationDefaults) -> SamplingParams:
        """How tokens are chosen; a temperature that is not given is 1, as with OpenAI.

        Args:
          vocab_size: V; keeping more tokens than there are is the same as keeping all.
          defaults: of the model, for what is not given.
        """
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.top_k is not None:
            given["top_k"] = self.top_k if 0 < self.top_k < vocab_size else 0
        return SamplingParams(
            **{"temperature": 1.0, **defaults.sampling, **given},
            seed=None if self.seed is None else self.seed % _SEEDS,
            logit_bias=tuple(self.logit_bias),
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(Generation):
    """POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "suffix": Unsupported("text cannot be filled in before a suffix"),
        "echo": Unsupported("the prompt is not repeated", (False,)),
        "best_of": Unsupported("use n, and choose among the outputs", (1,)),
    }

    prompt: PromptField
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Tell how likely each token was, and so many others."
    )


class Message(Strict):
    """One turn of a conversation. An answer of ours is a message, too: its empty fields are accepted."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "refusal": Unsupported("refusals are not told apart from content"),
        "annotations": Unsupported(_TEXT_ONLY.why, ([],), _NO_TOOLS.schema),
        "audio": _TEXT_ONLY,
        "tool_calls": _NO_TOOLS,
        "function_call": Unsupported(_NO_TOOLS.why),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: ContentField
    name: _Id | None = None

    def rendered(self) -> dict[str, Any]:
        """As the chat template gets it; "developer" is OpenAI's newer word for "system", which no template knows."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return turn if self.name is None else {**turn, "name": self.name}


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "tools": _NO_TOOLS,
        "tool_choice": _NO_CHOICE,
        "functions": _NO_TOOLS,
        "function_call": _NO_CHOICE,
        "response_format": Unsupported("the output cannot be held to a format", ({"type": "text"},)),
        "modalities": Unsupported(_TEXT_ONLY.why, (["text"],)),
        "audio": _TEXT_ONLY,
        "prediction": Unsupported("outputs cannot be predicted"),
        "reasoning_effort": Unsupported("the effort of reasoning cannot be set"),
        "verbosity": Unsupported("the length of an answer cannot be asked for, only limited by max_completion_tokens"),
        "web_search_options": Unsupported("the server searches no web"),
        "store": Unsupported("nothing is kept", (False,)),
    }

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: _Count | None = Field(None, description="OpenAI's newer name of max_tokens.")
    logprobs: bool | None = Field(None, description="Tell how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="And so many others; needs logprobs.")
    safety_identifier: _Id | None = Field(None, description="Accepted; has no effect.")
    prompt_cache_key: _Id | None = Field(None, description="Accepted; has no effect.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted; has no effect.")

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value", "top_logprobs needs logprobs: set logprobs to true", {"field": "top_logprobs"}
            )
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "invalid_value",
                "max_tokens and max_completion_tokens differ: give one of them",
                {"field": "max_completion_tokens"},
            )
        return self
