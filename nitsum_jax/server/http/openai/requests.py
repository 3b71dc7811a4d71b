"""The requests of OpenAI's API that are served, as pydantic models.

The names, types and defaults are OpenAI's; fields beyond its API are named as vLLM names them. What clients send and
is not supported is listed in known.py with the reason, which a client gets as an error.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, model_validator
from pydantic_core import PydanticCustomError

from nitsum_jax.engine.request import MAX_TOP_LOGPROBS, SamplingParams
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.calls import MAX_OUTPUTS, ChatPrompt, Prompt, TextPrompt
from nitsum_jax.server.http.fields import (
    MAX_TIER_CHARS,
    BiasField,
    PromptField,
    StopField,
    StopIdsField,
    Strict,
    TemplateVariables,
    Unsupported,
)
from nitsum_jax.server.http.openai.known import COMMON, HARMLESS, OF_CHAT, OF_COMPLETIONS
from nitsum_jax.server.http.openai.messages import Message
from nitsum_jax.server.http.openai.structured import HeldToForm
from nitsum_jax.server.http.openai.tooling import UNUSED, OffersTools

MAX_MESSAGES = 4096
_MAX_INT32, _MAX_INT64 = 2**31 - 1, 2**63 - 1
_SEEDS = 2**32
_SAMPLING = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")

_Count = Annotated[int, Field(ge=1, le=_MAX_INT32)]


class StreamOptions(Strict):
    """What a stream carries beside the output."""

    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        "include_obfuscation": Unsupported("streams are not padded", (False,))
    }

    include_usage: bool | None = Field(None, description="A last chunk without choices has the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk has the usage until then."
    )


class Generation(HeldToForm):
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
    max_tokens: int | None = Field(None, ge=0, le=_MAX_INT32, description="Most new tokens; 0 scores the prompt.")
    max_completion_tokens: _Count | None = Field(None, description="OpenAI's newer name of max_tokens.")
    min_tokens: int | None = Field(None, ge=0, le=_MAX_INT32, description="Nothing ends the output before.")
    stop: StopField = Field([])
    stop_token_ids: StopIdsField = Field([])
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Tell how likely each token of the prompt was, and so many others. Not with stream.",
    )
    n: int | None = Field(None, ge=1, le=MAX_OUTPUTS, description="Outputs per prompt; 1 if not given.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    service_tier: str | None = Field(
        None,
        max_length=MAX_TIER_CHARS,
        description="Name of a latency tier, or OpenAI's auto, default, flex, priority.",
    )
    include_stop_str_in_output: bool | None = Field(None, description="The output ends with its stop string.")
    skip_special_tokens: bool | None = Field(None, description="False: special tokens in the output are spelled.")
    metadata: dict[str, Any] | None = Field(None, description="Accepted; has no effect.")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "Generation":
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "prompt_logprobs are not told in streams: set stream to false, or use echo with logprobs",
                {"field": "prompt_logprobs"},
            )
        both = self.max_tokens is not None and self.max_completion_tokens is not None
        if both and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError(
                "invalid_value",
                "max_tokens and max_completion_tokens differ: give one of them",
                {"field": "max_completion_tokens"},
            )
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError(
                "invalid_value",
                "stream_options needs stream: set stream to true, or leave it out",
                {"field": "stream_options"},
            )
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

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


class CompletionRequest(Generation):
    """POST /v1/completions."""

    harmless: ClassVar[Mapping[str, str]] = HARMLESS
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **COMMON,
        **OF_COMPLETIONS,
    }

    echo: bool | None = Field(None, description="The output begins with the prompt; with logprobs, so do these.")
    prompt: PromptField
    logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="Tell how likely each token was, and so many others."
    )
    add_special_tokens: bool | None = Field(
        None, description="False: a text gets no token in front, such as that of its beginning."
    )

    def prompts(self) -> list[Prompt]:
        """What is to be continued."""
        if self.add_special_tokens is not False:
            return list(self.prompt)
        return [replace(one, add_special=False) if isinstance(one, TextPrompt) else one for one in self.prompt]


class ChatRequest(Generation, OffersTools):
    """POST /v1/chat/completions."""

    harmless: ClassVar[Mapping[str, str]] = HARMLESS
    unsupported: ClassVar[Mapping[str, Unsupported]] = {
        **COMMON,
        **OF_CHAT,
        **UNUSED,
        "echo": Unsupported("use prompt_logprobs to score a conversation", (False,)),
        "add_special_tokens": Unsupported("the template writes the special tokens", (False,)),
    }

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = Field(None, description="Tell how likely each token was.")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS, description="And so many others; needs logprobs.")
    add_generation_prompt: bool | None = Field(
        None, description="Whether the template begins the answer; true, unless continue_final_message."
    )
    continue_final_message: bool | None = Field(None, description="The answer continues the last message.")
    chat_template_kwargs: TemplateVariables = Field(
        None, description="Variables of the chat template, such as enable_thinking."
    )
    reasoning_effort: Literal["none"] | None = Field(
        None, description="none: the same as enable_thinking=false in chat_template_kwargs."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError(
                "invalid_value", "top_logprobs needs logprobs: set logprobs to true", {"field": "top_logprobs"}
            )
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "invalid_value",
                "continue_final_message needs add_generation_prompt to be false: leave one of them out",
                {"field": "continue_final_message"},
            )
        return self

    def chat_prompt(self) -> ChatPrompt:
        """What the chat template is given."""
        begin = self.add_generation_prompt
        quiet = {} if self.reasoning_effort is None else {"enable_thinking": False}
        variables = {**quiet, **(self.chat_template_kwargs or {})}
        options = ChatOptions(
            tools=[tool.rendered() for tool in self.offered()],
            variables=variables,
            add_generation_prompt=True if begin is None else begin,
            continue_final=bool(self.continue_final_message),
        )
        return ChatPrompt([message.rendered() for message in self.messages], options)
