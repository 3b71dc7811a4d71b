"""From the wire to the engine: GenerateRequest messages become `Request`s."""

import dataclasses
import secrets
import uuid
from collections.abc import Mapping, Sequence

from nitsum_jax.engine.request import MAX_SEED, Request, SamplingParams
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.server.backend import ServedModel
from nitsum_jax.server.proto import nitsum_pb2

DEFAULT_MAX_TOKENS = 256
DEFAULT_TIER = "standard"
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateCall:
    """A Generate call as the engine and the detokenizer see it."""

    request: Request
    stops: tuple[str, ...]
    return_prompt_ids: bool


def read_call(
    message: nitsum_pb2.GenerateRequest, model: ServedModel, tiers: Sequence[str], deadline_s: float | None
) -> GenerateCall:
    """Checks and translates a message.

    What only the engine can know (context length, pool size, tiers, range of prompt ids) it checks itself on submit.

    Args:
      message: as received.
      model: whose tokenizer and chat template turn text into ids.
      tiers: names of the tiers; a call that names none gets "standard", or the first where there is no such tier.
      deadline_s: of the call, on the engine's monotonic clock; None where it has none.

    Raises:
      InvalidInputError: the message is wrong; the text names the field.
      PreconditionError: chat messages for a model without a chat template.
    """
    stops = _stops(message.stop)
    stop_ids = _stop_ids(message.stop_token_ids, model.vocab_size)
    max_tokens = message.max_tokens if message.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    if max_tokens < 1:
        raise InvalidInputError(f"max_tokens={max_tokens} is out of range: give 1 or more")
    sampling = _sampling(message.sampling)
    sampling.validate()  # before the prompt is tokenized, which may take long
    request = Request(
        id=uuid.uuid4().hex,
        prompt_ids=_prompt_ids(message, model),
        max_tokens=max_tokens,
        sampling=sampling,
        stop_token_ids=stop_ids if message.ignore_eos else tuple(dict.fromkeys((*model.eos_ids, *stop_ids))),
        tier=message.tier or (DEFAULT_TIER if DEFAULT_TIER in tiers else tiers[0]),
        deadline_s=deadline_s,
    )
    return GenerateCall(request, stops, message.return_prompt_ids)


def prompt_size(message: nitsum_pb2.GenerateRequest) -> int:
    """Characters that must be tokenized for this message; tells whether it is cheap enough for the event loop."""
    return len(message.text) + sum(len(turn.content) for turn in message.chat.messages)


def _prompt_ids(message: nitsum_pb2.GenerateRequest, model: ServedModel) -> tuple[int, ...]:
    match message.WhichOneof("prompt"):
        case "text":
            ids: Sequence[int] = model.tokenizer.encode(message.text) if message.text else ()
        case "chat":
            # The template writes the special tokens itself.
            text = _chat_text([{"role": turn.role, "content": turn.content} for turn in message.chat.messages], model)
            ids = model.tokenizer.encode(text, add_special=False)
        case "tokens":
            ids = message.tokens.ids
        case _:
            raise InvalidInputError("the request has no prompt: set text, chat or tokens")
    if not ids:
        raise InvalidInputError("the prompt is empty: give at least one token of text, messages or ids")
    return tuple(ids)


def _chat_text(messages: Sequence[Mapping[str, str]], model: ServedModel) -> str:
    if not any(turn["content"] for turn in messages):
        raise InvalidInputError("the prompt is empty: chat needs at least one message with content")
    if not all(turn["role"] for turn in messages):
        raise InvalidInputError('every chat message needs a role, such as "user"')
    if model.render_chat is None:
        raise PreconditionError(f"model {model.name} has no chat template: send the prompt as text instead")
    return model.render_chat(messages)


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise InvalidInputError(f"{len(stops)} stop strings are too many: give at most {MAX_STOPS}")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise InvalidInputError(f"a stop string is empty or too long: give each 1 to {MAX_STOP_CHARS} characters")
    return tuple(dict.fromkeys(stops))


def _stop_ids(ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_IDS:
        raise InvalidInputError(f"{len(ids)} stop token ids are too many: give at most {MAX_STOP_IDS}")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InvalidInputError(f"stop token id {token} is outside the vocabulary: give 0 to {vocab_size - 1}")
    return tuple(ids)


def _sampling(message: nitsum_pb2.SamplingParams) -> SamplingParams:
    given = {field.name: value for field, value in message.ListFields()}
    # Drawn here rather than in the engine, so that the client can be told what would give the same answer again.
    given.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    return SamplingParams(**given)
