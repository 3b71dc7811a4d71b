"""From a call of the Python API to the engine's requests."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from nitsum_jax.engine.request import OutputForm, SamplingParams
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.calls import (
    Call,
    ChatPrompt,
    TextPrompt,
    TokenPrompt,
    Wanted,
    check,
    default_max_tokens,
    make_call,
    prompt_ids,
)
from nitsum_jax.runtime.local.options import CallOptions
from nitsum_jax.runtime.structured.forms import FormSpec
from nitsum_jax.runtime.tools.formats import TAGS
from nitsum_jax.runtime.tools.offer import ToolOffer, begins_thinking
from nitsum_jax.runtime.tools.reader import AnswerReader
from nitsum_jax.runtime.tools.turns import read_turn

GivenPrompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat, in OpenAI's form."""


@dataclasses.dataclass(frozen=True, slots=True)
class AskedPrompt:
    """One prompt of a call.

    Attributes:
      call: that answers it.
      reader: takes the answer apart; None: it is nothing but text.
    """

    call: Call
    reader: Callable[[], AnswerReader] | None = None


def asked_prompts(
    prompts: Sequence[GivenPrompt],
    sampling: SamplingParams | None,
    wanted: Mapping[str, Any],
    model: ServedModel,
    tiers: Sequence[str],
) -> list[AskedPrompt]:
    """What a call asks for.

    Args:
      prompts: of the call.
      sampling: how tokens are chosen; None: as the model's generation config says.
      wanted: its keyword arguments, see `CallOptions`.
      model: that answers.
      tiers: names of the tiers.

    Raises:
      NitsumError: something is wrong with it, or the model cannot do it.
    """
    if isinstance(prompts, str):
        raise InvalidInputError("prompts is one text: put it in a list")
    options = CallOptions.of(wanted)
    read = [_read(prompt, options) for prompt in prompts]
    scored = options.prompt_logprobs
    most = options.max_tokens
    what = Wanted(
        sampling or SamplingParams(**model.defaults.sampling),
        max_tokens=default_max_tokens(model.defaults) if most is None else most,
        stops=options.stops,
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
        min_tokens=options.min_tokens,
        logprobs=max((count for count in (options.logprobs, scored) if count is not None), default=None),
        tier=options.tier,
        include_stop=options.include_stop,
        skip_special=options.skip_special,
        score_prompt=scored is not None,
        ttft_ms=options.ttft_ms,
        tpot_ms=options.tpot_ms,
    )
    check(what, model.vocab_size, least_tokens=1 if scored is None else 0)
    offer, form = options.offer(), options.form()
    problem = offer.problem(model)
    if problem is not None:
        raise (PreconditionError if problem.of_model else InvalidInputError)(problem.message)
    asked = []
    for prompt in read:
        ids = prompt_ids(prompt, model)
        one, reader = what, None
        if isinstance(prompt, ChatPrompt):
            one, reader = _of_chat(what, offer, form, model, ids)
        elif form is not None:
            one = dataclasses.replace(what, form=_compiled(form, model))
        asked.append(AskedPrompt(make_call(one, ids, model, tiers), reader))
    return asked


def asked_vectors(
    texts: Sequence[str | Sequence[int]], wanted: Mapping[str, Any], model: ServedModel, tiers: Sequence[str]
) -> list[AskedPrompt]:
    """What a call for embeddings asks for.

    Args:
      texts: or token ids.
      wanted: tier, ttft_ms and tpot_ms.
      model: that makes them.
      tiers: names of the tiers.

    Raises:
      NitsumError: something is wrong with it, or the model gives none.
    """
    if model.pooling is None:
        raise PreconditionError("this model gives no embeddings: make the LLM with pooling='last' or 'mean'")
    if isinstance(texts, str):
        raise InvalidInputError("texts is one text: put it in a list")
    wrong = sorted(set(wanted) - {"tier", "ttft_ms", "tpot_ms"})
    if wrong:
        raise InvalidInputError(f"{wrong[0]!r} is not known: known are tier, tpot_ms, ttft_ms")
    what = Wanted(max_tokens=1, pooling=model.pooling, **wanted)
    check(what, model.vocab_size)
    encoded = [prompt_ids(TextPrompt(one) if isinstance(one, str) else TokenPrompt(one), model) for one in texts]
    return [AskedPrompt(make_call(what, ids, model, tiers)) for ids in encoded]


def _read(prompt: GivenPrompt, options: CallOptions) -> TextPrompt | TokenPrompt | ChatPrompt:
    messages = [] if isinstance(prompt, str) else [part for part in prompt if isinstance(part, Mapping)]
    if messages and len(messages) < len(prompt):
        raise InvalidInputError("a prompt holds messages and something else: give a text, token ids, or messages")
    if messages:
        told = () if options.tool_choice == "none" else tuple(options.tools)
        variables, continued = options.chat_template_kwargs, options.continue_final_message
        return ChatPrompt(
            [read_turn(message) for message in messages],
            ChatOptions(tools=told, variables=variables, continue_final=continued),
        )
    if options.tools or options.chat_template_kwargs or options.continue_final_message:
        raise InvalidInputError(
            "tools, chat_template_kwargs and continue_final_message are for chats: give the prompt as messages"
        )
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    return TokenPrompt([int(part) for part in prompt if not isinstance(part, Mapping)])


def _of_chat(
    what: Wanted, offer: ToolOffer, form: FormSpec | None, model: ServedModel, ids: Sequence[int]
) -> tuple[Wanted, Callable[[], AnswerReader] | None]:
    """What is wanted of an answer that may think, call tools, and hold a form."""
    thinking = begins_thinking(model, ids)
    named = offer.form(model, None if form is None else ("form", form), thinking)
    reader = offer.reader(model, thinking)
    held = None if named is None else _compiled(named[1], model)
    return dataclasses.replace(what, form=held, shown=frozenset() if reader is None else TAGS), reader


def _compiled(spec: FormSpec, model: ServedModel) -> OutputForm:
    if model.forms is None:
        raise PreconditionError(f"outputs of model {model.name} cannot be held to a form")
    return model.forms.compile(spec)
