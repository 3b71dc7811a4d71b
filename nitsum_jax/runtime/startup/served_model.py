"""A model as front ends need it: names, ids, text and its chat template."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults, generation_defaults
from nitsum_jax.models.pooling import chosen_pooling
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.backend import ServedModel
from nitsum_jax.runtime.tools.formats import ToolFormat, format_of, thinks

if TYPE_CHECKING:
    from nitsum_jax.models.loading import OpenModel


AUTO, NONE = "auto", "none"
TOOL_PARSERS = (AUTO, NONE, *(form.value for form in ToolFormat))
REASONING_PARSERS = (AUTO, NONE, "think")


def served_model(
    model: "OpenModel",
    name: str | None,
    generation_config: str = AUTO,
    *,
    tool_parser: str = AUTO,
    reasoning_parser: str = AUTO,
    pooling: str = AUTO,
) -> ServedModel:
    """What front ends need of a model.

    Args:
      model: the model.
      name: what clients call it, its own if None.
      generation_config: "auto": what a request does not set is as the model's generation config says; "none": that is
        ignored.
      tool_parser: one of TOOL_PARSERS; "auto": as the chat template teaches.
      reasoning_parser: one of REASONING_PARSERS, likewise.
      pooling: one of POOLINGS, as that of the engine; "auto": as the model's files say.

    Raises:
      InvalidInputError: the generation config cannot be used.
    """
    from nitsum_jax.models.text.chat import render_chat
    from nitsum_jax.runtime.structured.compiler import FormCompiler

    tokenizer = model.tokenizer

    def chat(messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        return render_chat(
            tokenizer.chat_template, messages, options, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )

    return ServedModel(
        name=name or model.name,
        tokenizer=tokenizer,
        vocab_size=model.config.vocab_size,
        eos_ids=model.config.eos_ids,
        render_chat=chat if tokenizer.chat_template else None,
        defaults=_defaults(model) if generation_config == "auto" else GenerationDefaults(),
        forms=FormCompiler(tokenizer, model.config.vocab_size, model.config.eos_ids),
        tools=_tool_format(tool_parser, tokenizer.chat_template),
        thinks=thinks(tokenizer.chat_template) if reasoning_parser == AUTO else reasoning_parser != NONE,
        pooling=chosen_pooling(pooling, model.pooling),
    )


def _tool_format(parser: str, template: str | None) -> ToolFormat | None:
    if parser == AUTO:
        return format_of(template)
    return None if parser == NONE else ToolFormat(parser)


def _defaults(model: "OpenModel") -> GenerationDefaults:
    try:
        defaults = generation_defaults(model.generation, model.config.vocab_size)
        SamplingParams(**defaults.sampling).validate()
        if defaults.max_new_tokens is not None and defaults.max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens={defaults.max_new_tokens} is out of range: give 1 or more")
    except InvalidInputError as error:
        raise InvalidInputError(
            f"the generation config of {model.name} cannot be used: {error}. Correct it, or leave it out with "
            "generation_config=none"
        ) from None
    return defaults
