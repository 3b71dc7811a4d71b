"""What a call of the Python API may ask for, beside its prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.forms import FormSpec
from nitsum_jax.runtime.tools.formats import Tool
from nitsum_jax.runtime.tools.offer import ToolOffer

_WORDS = ("auto", "none", "required")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """What a call may ask for.

    Attributes:
      max_tokens: at most this many new tokens; None: as the model's generation config says, else 256. It may be 0 if
        the prompt is scored.
      stop: a text, or several, before which the output ends.
      stop_token_ids: token ids before which the output ends, in addition to those of the model.
      min_tokens: neither stop ids nor stop texts end the output before this many tokens.
      ignore_eos: if true, the end-of-sequence ids of the model do not end the output.
      include_stop: whether the output ends with the stop text that ended it, rather than before it.
      skip_special: whether special tokens of an output say nothing, or are spelled.
      logprobs: None, or how many of the most likely tokens are listed beside each token.
      prompt_logprobs: the same for the tokens of the prompt, behind its first.
      tier: name of the latency tier, "" for the default.
      ttft_ms: target of its own for the time to the first token, milliseconds; None: that of its tier.
      tpot_ms: likewise, for the time per token after the first.
      json_schema: the output is held to it: a dictionary, JSON, or a class of pydantic.
      json_object: if true, the output is held to be a JSON object.
      regex: the output is held to match it whole.
      choice: the output is held to be one of these texts.
      grammar: the output is held to it: Lark, as llguidance has it, or GBNF.
      tools: for chats: functions that the model may call, in OpenAI's form.
      tool_choice: "auto", "none", "required", or the name of the function that must be called.
      parallel_tool_calls: whether calls that are forced may be several.
      chat_template_kwargs: for chats: variables of the chat template, such as {"enable_thinking": False}.
      continue_final_message: for chats: the answer continues the last message.
    """

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    tier: str = ""
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    json_schema: Any = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    continue_final_message: bool = False

    @classmethod
    def of(cls, wanted: Mapping[str, Any]) -> "CallOptions":
        """Takes the keyword arguments of a call.

        Raises:
          InvalidInputError: one of them is not known.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = sorted(set(wanted) - known)
        if wrong:
            raise InvalidInputError(f"{wrong[0]!r} is not known: known are {', '.join(sorted(known))}")
        return cls(**wanted)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def form(self) -> FormSpec | None:
        """What the output is held to; None: it is free.

        Raises:
          InvalidInputError: it is malformed, or there are several.
        """
        given: dict[str, FormSpec] = {}
        if self.json_schema is not None:
            given["json_schema"] = forms.json_schema(_schema(self.json_schema))
        if self.json_object:
            given["json_object"] = forms.json_object()
        if self.regex is not None:
            given["regex"] = forms.regex(self.regex)
        if self.choice is not None:
            given["choice"] = forms.choice(_choices(self.choice))
        if self.grammar is not None:
            given["grammar"] = forms.grammar(self.grammar)
        if len(given) > 1:
            raise InvalidInputError(f"an output is held to one form, and {', '.join(given)} give several: give one")
        return next(iter(given.values()), None)

    def offer(self) -> ToolOffer:
        """The tools.

        Raises:
          InvalidInputError: one of them is malformed.
        """
        tools = [_tool(one) for one in self.tools]
        choice = self.tool_choice if self.tool_choice in _WORDS else f"={self.tool_choice}"
        return ToolOffer(tools, choice, self.parallel_tool_calls)


def _schema(given: Any) -> Any:
    if isinstance(given, str):
        try:
            given = from_json(given)
        except ValueError as error:
            raise InvalidInputError(f"json_schema is not valid JSON: {error}") from None
    elif (make := getattr(given, "model_json_schema", None)) is not None:
        given = make()
    if not isinstance(given, dict | bool):
        raise InvalidInputError("json_schema must be a JSON schema: a dictionary, JSON, or a class of pydantic")
    return given


def _choices(given: Sequence[str]) -> Sequence[str]:
    if isinstance(given, str) or not given or not all(isinstance(one, str) and one for one in given):
        raise InvalidInputError('choice must be a list of texts, such as ["yes", "no"]')
    return given


def _tool(given: Mapping[str, Any]) -> Tool:
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    parameters = function.get("parameters") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or not isinstance(parameters, Mapping | None):
        raise InvalidInputError(
            'a tool must be like {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'
        )
    return Tool(name, parameters or {"type": "object"})
