"""From the wire to the engine: GenerateRequest messages become a prompt and what is wanted of it."""

from typing import Any

from pydantic_core import from_json

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.calls import ChatPrompt, Prompt, TextPrompt, TokenPrompt, Wanted, default_max_tokens
from nitsum_jax.runtime.structured import forms
from nitsum_jax.runtime.structured.forms import FormSpec
from nitsum_jax.runtime.tools.formats import TAGS, Tool
from nitsum_jax.runtime.tools.offer import ToolOffer
from nitsum_jax.server.proto import nitsum_pb2

_ANY = {"type": "object"}


def read_wanted(
    message: nitsum_pb2.GenerateRequest, deadline_s: float | None, defaults: GenerationDefaults = GenerationDefaults()
) -> Wanted:
    """What a message wants, not checked yet.

    Args:
      message: as received.
      deadline_s: of the call, on the engine's monotonic clock; None where it has none.
      defaults: of the model, for what the message does not set.
    """
    given = {field.name: value for field, value in message.sampling.ListFields()}
    given["logit_bias"] = tuple(message.sampling.logit_bias.items())
    return Wanted(
        sampling=SamplingParams(**{**defaults.sampling, **given}),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else default_max_tokens(defaults),
        stops=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        min_tokens=message.min_tokens,
        logprobs=max(
            (getattr(message, name) for name in ("logprobs", "prompt_logprobs") if message.HasField(name)),
            default=None,
        ),
        tier=message.tier,
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else None,
        tpot_ms=message.tpot_ms if message.HasField("tpot_ms") else None,
        deadline_s=deadline_s,
        include_stop=message.include_stop,
        skip_special=not message.show_special_tokens,
        score_prompt=message.HasField("prompt_logprobs"),
        shown=TAGS if splits(message) else frozenset(),
    )


def splits(message: nitsum_pb2.GenerateRequest) -> bool:
    """Whether thoughts and calls come apart from the text."""
    return message.WhichOneof("prompt") == "chat" and (message.split or bool(message.chat.tools))


def read_offer(message: nitsum_pb2.GenerateRequest) -> ToolOffer:
    """The tools of a message.

    Raises:
      InvalidInputError: one of them is malformed.
    """
    choice = message.chat.tool_choice or "auto"
    if choice not in ("auto", "none", "required") and not choice.startswith("="):
        raise InvalidInputError(f'tool_choice={choice[:40]!r} is not known: give auto, none, required, or "=name"')
    tools = [Tool(tool.name, _object(tool.parameters, "parameters") or _ANY) for tool in message.chat.tools]
    if not all(tool.name for tool in tools):
        raise InvalidInputError("a tool has no name: give each one")
    return ToolOffer(tools, choice, parallel=not message.chat.single_tool_call)


def read_form(message: nitsum_pb2.GenerateRequest) -> FormSpec | None:
    """What the output is held to.

    Raises:
      InvalidInputError: the form is empty, or its schema is not valid JSON.
    """
    if not message.HasField("form"):
        return None
    form = message.form
    match form.WhichOneof("form"):
        case "json_schema":
            return forms.json_schema(_parsed(form.json_schema, "json_schema"))
        case "regex" if form.regex:
            return forms.regex(form.regex)
        case "choice" if form.choice.options:
            return forms.choice(form.choice.options)
        case "grammar" if form.grammar:
            return forms.grammar(form.grammar)
        case "json_object" if form.json_object:
            return forms.json_object()
        case _:
            raise InvalidInputError("the form is empty: set json_schema, regex, choice, grammar or json_object")


def _parsed(text: str, field: str) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise InvalidInputError(f"{field} is not valid JSON: {error}") from None


def _object(text: str, field: str) -> dict[str, Any]:
    value = _parsed(text, field) if text else {}
    if not isinstance(value, dict):
        raise InvalidInputError(f"{field} is not an object of JSON")
    return value


def _turn(turn: nitsum_pb2.ChatMessage) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.tool_calls:
        message["content"] = turn.content or None
        message["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": _object(call.arguments, "arguments")},
            }
            for call in turn.tool_calls
        ]
    for key, value in (("tool_call_id", turn.tool_call_id), ("reasoning_content", turn.reasoning)):
        if value:
            message[key] = value
    return message


def _chat(chat: nitsum_pb2.ChatPrompt) -> ChatPrompt:
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                **({"description": tool.description} if tool.description else {}),
                "parameters": _object(tool.parameters, "parameters") or _ANY,
            },
        }
        for tool in chat.tools
        if chat.tool_choice != "none"
    ]
    variables = _object(chat.template_variables, "template_variables")
    options = ChatOptions(tools=tools, variables=variables, continue_final=chat.continue_final_message)
    return ChatPrompt([_turn(turn) for turn in chat.messages], options)


def read_prompt(message: nitsum_pb2.GenerateRequest) -> Prompt:
    """The prompt of a message.

    Raises:
      InvalidInputError: there is none.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            return _chat(message.chat)
        case "tokens":
            return TokenPrompt(message.tokens.ids)
        case _:
            raise InvalidInputError("the request has no prompt: set text, chat or tokens")
