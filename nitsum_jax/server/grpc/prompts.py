"""From the wire to the engine: GenerateRequest messages become a prompt and what is wanted of it."""

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.runtime.calls import ChatPrompt, Prompt, TextPrompt, TokenPrompt, Wanted, default_max_tokens
from nitsum_jax.server.proto import nitsum_pb2


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
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        tier=message.tier,
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else None,
        tpot_ms=message.tpot_ms if message.HasField("tpot_ms") else None,
        deadline_s=deadline_s,
    )


def read_prompt(message: nitsum_pb2.GenerateRequest) -> Prompt:
    """The prompt of a message.

    Raises:
      InvalidInputError: there is none.
    """
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            return ChatPrompt([{"role": turn.role, "content": turn.content} for turn in message.chat.messages])
        case "tokens":
            return TokenPrompt(message.tokens.ids)
        case _:
            raise InvalidInputError("the request has no prompt: set text, chat or tokens")
