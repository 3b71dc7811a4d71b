"""What every front end does with a request that it has read: checks, the ids of the prompt, the engine's `Request`.

A front end translates its own messages into `Wanted` and a `Prompt`; everything behind that is here, so that gRPC, HTTP
and JetStream's protocol refuse the same things with the same words.
"""

import asyncio
import dataclasses
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from nitsum_jax.control.tiers import LEAST_TARGET_MS, MOST_TARGET_MS
from nitsum_jax.engine.request import MAX_SEED, OutputForm, Request, SamplingParams
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.models.pooling import Pooling
from nitsum_jax.models.text.chat_options import ChatOptions
from nitsum_jax.runtime.backend import Backend, ServedModel
from nitsum_jax.runtime.callers import current_caller
from nitsum_jax.runtime.structured.forms import FormSpec

DEFAULT_MAX_TOKENS = 256
DEFAULT_TIER = "standard"
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 64
MAX_OUTPUTS = 128
"""Most outputs that one call of a client may ask for."""

_LONG_PROMPT_CHARS = 4096  # about a millisecond of tokenizing; longer ones must not hold up the other streams


@dataclasses.dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text.

    Attributes:
      text: as the client sent it.
      add_special: whether the ids that the model begins texts with are put before it.
    """

    text: str
    add_special: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class ChatPrompt:
    """Messages, each with "role" and "content" (a text, or text parts), for the chat template of the model."""

    messages: Sequence[Mapping[str, Any]]
    options: ChatOptions = ChatOptions()


@dataclasses.dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, used as they are."""

    ids: Sequence[int]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The parameters of a call, without its prompt.

    Attributes:
      sampling: how tokens are chosen; without a seed one is drawn.
      max_tokens: at most this many new tokens; if a call gives no limit, front ends take the model's own if it has one.
      stops: strings before which the output ends.
      stop_token_ids: token ids before which the output ends, in addition to those of the model.
      ignore_eos: if true, the end-of-sequence ids of the model do not end the output.
      min_tokens: neither stop ids nor stop strings end the output before this many tokens.
      logprobs: None, or how many of the most likely tokens are listed beside each token.
      tier: name of the latency tier, "" for the default.
      deadline_s: time at which the request is given up, on the engine's monotonic clock.
      include_stop: whether the output ends with the stop string that ended it, rather than before it.
      skip_special: whether special tokens of an output say nothing, or are spelled.
      form: what the output is held to, see `compiled`; it ends with the form, even if `ignore_eos` is set.
      shown: special tokens that are spelled even if the others are not.
      score_prompt: whether the tokens of the prompt are told with how likely each was; needs `logprobs`.
      ttft_ms, tpot_ms: targets of its own, milliseconds; None: those of its tier.
      pooling: how the prompt becomes an embedding; None: none is wanted.
    """

    sampling: SamplingParams = SamplingParams()
    max_tokens: int = DEFAULT_MAX_TOKENS
    stops: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    tier: str = ""
    deadline_s: float | None = None
    include_stop: bool = False
    skip_special: bool = True
    form: OutputForm | None = None
    score_prompt: bool = False
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    shown: frozenset[str] = frozenset()
    pooling: Pooling | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One output to be made, as the engine and the detokenizer see it; see `Wanted`.

    Where a prompt is scored, the engine gets its first token, and is given the others to say.

    Attributes:
      prompt_ids: the whole prompt.
      silent: no token of the output is wanted, where the engine makes at least one.
    """

    request: Request
    stops: tuple[str, ...]
    include_stop: bool = False
    skip_special: bool = True
    prompt_ids: tuple[int, ...] = ()
    silent: bool = False
    shown: frozenset[str] = frozenset()


def check(wanted: Wanted, vocab_size: int, *, least_tokens: int = 1) -> None:
    """Looks at everything that needs no tokenizer; call it first, because tokenizing may take long.

    What only the engine can know (context length, pool size, tiers, range of prompt ids) it checks itself on submit.

    Args:
      wanted: to be looked at.
      vocab_size: V.
      least_tokens: least max_tokens that the protocol knows; 0 asks for the prompt alone.

    Raises:
      InvalidInputError: something is wrong; the text names it.
    """
    if len(wanted.stops) > MAX_STOPS:
        raise InvalidInputError(f"{len(wanted.stops)} stop strings are too many: give at most {MAX_STOPS}")
    if any(not 1 <= len(stop) <= MAX_STOP_CHARS for stop in wanted.stops):
        raise InvalidInputError(f"a stop string is empty or too long: give each 1 to {MAX_STOP_CHARS} characters")
    if len(wanted.stop_token_ids) > MAX_STOP_IDS:
        raise InvalidInputError(
            f"{len(wanted.stop_token_ids)} stop token ids are too many: give at most {MAX_STOP_IDS}"
        )
    for token in wanted.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise InvalidInputError(f"stop token id {token} is outside the vocabulary: give 0 to {vocab_size - 1}")
    if wanted.max_tokens < least_tokens:
        raise InvalidInputError(f"max_tokens={wanted.max_tokens} is out of range: give {least_tokens} or more")
    if not 0 <= wanted.min_tokens <= wanted.max_tokens:
        raise InvalidInputError(f"min_tokens={wanted.min_tokens} is out of range: give 0 to max_tokens")
    check_target("ttft_ms", wanted.ttft_ms)
    check_target("tpot_ms", wanted.tpot_ms)
    wanted.sampling.validate()


def check_target(name: str, value: float | None) -> None:
    """Raises InvalidInputError if a target that a request names, in milliseconds, is out of range (NaN included)."""
    if value is not None and not LEAST_TARGET_MS <= value <= MOST_TARGET_MS:
        raise InvalidInputError(
            f"{name}={value:g} is out of range: give {LEAST_TARGET_MS:g} to {MOST_TARGET_MS:g} milliseconds"
        )


def check_outputs(count: int, backend: Backend, field: str) -> None:
    """Refuses a call for more outputs than the queue ever takes, or than its caller may have.

    Args:
      count: outputs of the call, each a request of its own.
      backend: whose queue it is.
      field: what the client gave, such as "n=200".

    Raises:
      InvalidInputError: there are more than may wait, so that trying again would never help.
      NitsumError: the caller may not have so many, or not now.
    """
    if count < 2:
        return
    if count > (most := backend.engine.stats().queue_capacity):
        raise InvalidInputError(f"{field} is too large: at most {most} requests may wait here: ask for fewer at once")
    current_caller().more(count - 1)


def prompt_size(prompt: Prompt) -> int:
    """Characters that must be tokenized, and rendered before."""
    match prompt:
        case TextPrompt(text):
            return len(text)
        case ChatPrompt(messages, options):
            return _chars([*messages, *options.tools, *options.variables.values()])
        case TokenPrompt():
            return 0


def prompt_ids(prompt: Prompt, model: ServedModel) -> tuple[int, ...]:
    """The token ids of a prompt.

    Raises:
      InvalidInputError: the prompt is empty, or the template refuses the messages.
      PreconditionError: chat messages for a model without a chat template.
    """
    match prompt:
        case TextPrompt(text, add_special):
            ids: Sequence[int] = model.tokenizer.encode(text, add_special) if text else ()
        case ChatPrompt():
            # The template writes the special tokens itself.
            ids = model.tokenizer.encode(_chat_text(prompt, model), add_special=False)
        case TokenPrompt(given):
            ids = given
    if not ids:
        raise InvalidInputError("the prompt is empty: give at least one token of text, messages or ids")
    return tuple(ids)


async def encode(prompts: Sequence[Prompt], model: ServedModel) -> list[tuple[int, ...]]:
    """The token ids of each prompt; beside the event loop if it takes long.

    Raises:
      NitsumError: as `prompt_ids`.
    """
    if sum(map(prompt_size, prompts)) > _LONG_PROMPT_CHARS:
        return await asyncio.to_thread(lambda: [prompt_ids(prompt, model) for prompt in prompts])
    return [prompt_ids(prompt, model) for prompt in prompts]


async def compiled(spec: FormSpec, model: ServedModel) -> OutputForm:
    """A form for outputs of a model; compiled beside the event loop.

    Raises:
      InvalidInputError: it is malformed, or uses what is not supported; the text has the reason.
      PreconditionError: outputs of this model cannot be held to a form.
    """
    if model.forms is None:
        raise PreconditionError(f"outputs of model {model.name} cannot be held to a form")
    return await asyncio.to_thread(model.forms.compile, spec)


def make_call(
    wanted: Wanted, ids: tuple[int, ...], model: ServedModel, tiers: Sequence[str], request_id: str | None = None
) -> Call:
    """The engine's request of something that `check` has passed.

    Args:
      wanted: what the client wants.
      ids: of the prompt.
      model: whose end-of-sequence ids end the output.
      tiers: names of the tiers; a request that names none gets "standard", or the first where there is no such tier.
      request_id: unique among those alive; made here if None.
    """
    sampling = wanted.sampling
    if sampling.seed is None:
        # Drawn here rather than in the engine, so that the client can learn what would give the same answer again.
        sampling = dataclasses.replace(sampling, seed=secrets.randbelow(MAX_SEED + 1))
    stop_ids = tuple(wanted.stop_token_ids)
    if not wanted.ignore_eos or wanted.form is not None:
        stop_ids = tuple(dict.fromkeys((*model.eos_ids, *stop_ids)))
    given = ids[1:] if wanted.score_prompt else ()
    request = Request(
        id=request_id or uuid.uuid4().hex,
        prompt_ids=ids[:1] if wanted.score_prompt else ids,
        max_tokens=max(1, len(given) + wanted.max_tokens),
        sampling=sampling,
        stop_token_ids=stop_ids,
        tier=wanted.tier or default_tier(tiers),
        deadline_s=wanted.deadline_s,
        min_tokens=wanted.min_tokens,
        logprobs=wanted.logprobs,
        form=wanted.form,
        forced_ids=given,
        ttft_ms=wanted.ttft_ms,
        tpot_ms=wanted.tpot_ms,
        pooling=wanted.pooling,
    )
    stops = tuple(dict.fromkeys(wanted.stops))
    return Call(request, stops, wanted.include_stop, wanted.skip_special, ids, wanted.max_tokens == 0, wanted.shown)


def check_embeds(model: ServedModel) -> None:
    """Raises PreconditionError if the model gives no embeddings."""
    if model.pooling is None:
        raise PreconditionError(
            f"The model `{model.name}` gives no embeddings: serve one whose files say how it makes them, or start the "
            "server with --pooling=last or mean"
        )


async def embedding_calls(
    texts: Sequence[Prompt],
    backend: Backend,
    *,
    tier: str,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    deadline_s: float | None = None,
) -> list[Call]:
    """One call per text, each with one token that nobody sees.

    Args:
      texts: at most MAX_OUTPUTS of them.
      backend: that makes the embeddings.
      tier: name of the latency tier, "" for the default.
      ttft_ms: target of its own, as in `Wanted`.
      tpot_ms: likewise.
      deadline_s: likewise.

    Raises:
      NitsumError: a text is empty, there are too many for now, a target is out of range, or the model gives none.
    """
    model, tiers = backend.model, backend.engine.tier_names
    check_embeds(model)
    check_outputs(len(texts), backend, f"{len(texts)} texts")
    wanted = Wanted(
        max_tokens=0, tier=tier, ttft_ms=ttft_ms, tpot_ms=tpot_ms, deadline_s=deadline_s, pooling=model.pooling
    )
    check(wanted, model.vocab_size, least_tokens=0)
    name = f"embd-{uuid.uuid4().hex}"
    encoded = await encode(texts, model)
    return [make_call(wanted, ids, model, tiers, f"{name}-{index}") for index, ids in enumerate(encoded)]


def default_max_tokens(defaults: GenerationDefaults) -> int:
    """The limit of requests that have none."""
    return DEFAULT_MAX_TOKENS if defaults.max_new_tokens is None else defaults.max_new_tokens


def default_tier(tiers: Sequence[str]) -> str:
    """The tier of requests that name none."""
    return DEFAULT_TIER if DEFAULT_TIER in tiers else tiers[0]


def derived_seed(seed: int, index: int) -> int:
    """The seed of output `index` of a request for several; that of the first is the seed itself."""
    return (seed + index * 0x9E3779B9) % (MAX_SEED + 1)  # the odd fraction of 2^32 that spreads neighbours widest


def _chars(values: list[Any]) -> int:
    """Characters of all texts in values of JSON."""
    size, left = 0, values
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
    return size


def _chat_text(prompt: ChatPrompt, model: ServedModel) -> str:
    if not prompt.messages:
        raise InvalidInputError("the prompt is empty: chat needs at least one message")
    if not all(turn["role"] for turn in prompt.messages):
        raise InvalidInputError('every chat message needs a role, such as "user"')
    if model.render_chat is None:
        raise PreconditionError(f"model {model.name} has no chat template: send the prompt as text instead")
    return model.render_chat(prompt.messages, prompt.options)
