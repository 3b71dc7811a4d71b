"""From a checked request to the engine requests that answer it."""

import dataclasses
import time
import uuid
from collections.abc import Callable, Sequence

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.backend import Backend
from nitsum_jax.runtime.calls import (
    MAX_OUTPUTS,
    Call,
    Prompt,
    TextPrompt,
    Wanted,
    check,
    check_outputs,
    compiled,
    derived_seed,
    encode,
    make_call,
)
from nitsum_jax.runtime.tools.formats import TAGS
from nitsum_jax.runtime.tools.offer import begins_thinking
from nitsum_jax.runtime.tools.reader import AnswerReader
from nitsum_jax.server.gateway import GatewayHeaders
from nitsum_jax.server.http.answering import check_model
from nitsum_jax.server.http.errors import ApiError
from nitsum_jax.server.http.openai.logprobs import Echo
from nitsum_jax.server.http.openai.requests import ChatRequest, CompletionRequest, Generation
from nitsum_jax.server.http.openai.tiers import choose_tier

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's. A chat answer without a limit is as long as the model's authors say, or as the context allows."""

_UNLIMITED = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class RequestPlan:
    """What answers one HTTP request.

    Attributes:
      id: of the response.
      created: seconds since 1970.
      model: id of the model.
      tier: name of the latency tier.
      told_tier: what the response calls it.
      calls: one per output: all of the first prompt, then all of the second.
      outputs: of each prompt.
      prompt_tokens: of all prompts, each counted once.
      echoes: the prompts, if they are repeated before their outputs.
      reader: makes what takes an answer apart; None: answers are text.
      prompt_logprobs: None, or how many of the likeliest tokens are told beside each token of a prompt.
    """

    id: str
    created: int
    model: str
    tier: str
    told_tier: str
    calls: Sequence[Call]
    outputs: int
    prompt_tokens: int
    echoes: Sequence[Echo] = ()
    prompt_logprobs: int | None = None
    reader: Callable[[], AnswerReader] | None = None

    def cached_tokens(self, of_outputs: Sequence[int]) -> int:
        """Tokens of all prompts that were not computed, each counted once.

        Several outputs of a prompt share what the first of them has computed; that was no gain of the cache.

        Args:
          of_outputs: tokens that the cache had for each call.
        """
        return sum(min(of_outputs[first : first + self.outputs]) for first in range(0, len(of_outputs), self.outputs))


async def plan_completion(request: CompletionRequest, backend: Backend, asked: GatewayHeaders) -> RequestPlan:
    """Plans /v1/completions.

    Raises:
      ApiError: model or tier are not known, or too many outputs are asked for.
      NitsumError: the request is wrong, or does not fit the model.
    """
    limit = DEFAULT_COMPLETION_TOKENS if request.limit is None else request.limit
    prompts = request.prompts()
    response_id, echo = f"cmpl-{uuid.uuid4().hex}", bool(request.echo)
    plan = await _plan(response_id, request, prompts, limit, request.logprobs, backend, asked, echo=echo)
    if not echo:
        return plan
    encoded = [call.prompt_ids for call in plan.calls[:: plan.outputs]]
    return dataclasses.replace(plan, echoes=[_echo(*one, backend) for one in zip(prompts, encoded, strict=True)])


def _echo(prompt: Prompt, ids: Sequence[int], backend: Backend) -> Echo:
    stream, offsets, length = backend.model.tokenizer.stream(), [], 0
    for token in ids:
        offsets.append(length)
        length += len(stream.push((token,)))
    text = prompt.text if isinstance(prompt, TextPrompt) else backend.model.tokenizer.decode(ids, starts_text=True)
    return Echo(text, ids, offsets)


async def plan_chat(request: ChatRequest, backend: Backend, asked: GatewayHeaders) -> RequestPlan:
    """Plans /v1/chat/completions.

    Raises:
      ApiError, NitsumError: as plan_completion.
    """
    check_model(request.model, backend.model)
    request.check_tools(backend.model)
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return await _plan(
        f"chatcmpl-{uuid.uuid4().hex}", request, [request.chat_prompt()], request.limit, logprobs, backend, asked
    )


async def _plan(
    response_id: str,
    request: Generation,
    prompts: Sequence[Prompt],
    limit: int | None,
    logprobs: int | None,
    backend: Backend,
    asked: GatewayHeaders,
    *,
    echo: bool = False,
) -> RequestPlan:
    scored = request.prompt_logprobs
    score = scored is not None or (echo and logprobs is not None)
    model, tiers = backend.model, backend.engine.tier_names
    check_model(request.model, model)
    outputs = request.n or 1
    if len(prompts) * outputs > MAX_OUTPUTS:
        message = f"{len(prompts)} prompts with n={outputs} are too many outputs: ask for at most {MAX_OUTPUTS}"
        raise ApiError(400, message, param="n")
    try:
        several = f"n={outputs}" if len(prompts) == 1 else f"n={outputs} for each of {len(prompts)} prompts"
        check_outputs(len(prompts) * outputs, backend, several)
    except InvalidInputError as error:
        raise ApiError(400, str(error), param="n") from None
    tier, told_tier = choose_tier(request.service_tier, tiers, asked)
    wanted = Wanted(
        sampling=request.sampling(model.vocab_size, model.defaults),
        max_tokens=_UNLIMITED if limit is None else limit,
        stops=request.stop,
        stop_token_ids=request.stop_token_ids,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=request.min_tokens or 0,
        logprobs=max((count for count in (logprobs, scored) if count is not None), default=None),
        score_prompt=score,
        tier=tier,
        ttft_ms=asked.ttft_ms,
        tpot_ms=asked.tpot_ms,
        include_stop=bool(request.include_stop_str_in_output),
        skip_special=request.skip_special_tokens is not False,
    )
    check(wanted, model.vocab_size, least_tokens=0)
    encoded = await encode(prompts, model)
    form, reader = request.form(), None
    if isinstance(request, ChatRequest):
        thinking = begins_thinking(model, encoded[0])
        form, reader = request.offer.form(model, form, thinking), request.offer.reader(model, thinking)
        wanted = dataclasses.replace(wanted, shown=TAGS if reader is not None else frozenset())
    if form is not None:
        field, spec = form
        try:
            wanted = dataclasses.replace(wanted, form=await compiled(spec, model))
        except InvalidInputError as error:
            raise ApiError(400, str(error), param=field) from None
    context = backend.engine.context_limit()
    calls: list[Call] = []
    for ids in encoded:
        one = (
            wanted
            if limit is not None
            else _up_to_the_context(wanted, context - len(ids), model.defaults.max_new_tokens)
        )
        for index in range(outputs):
            calls.append(make_call(_seeded(one, index), ids, model, tiers, f"{response_id}-{len(calls)}"))
    prompt_tokens = sum(map(len, encoded))
    return RequestPlan(
        response_id,
        int(time.time()),
        model.name,
        tier,
        told_tier,
        calls,
        outputs,
        prompt_tokens,
        prompt_logprobs=scored,
        reader=reader,
    )


def _up_to_the_context(wanted: Wanted, room: int, usual: int | None) -> Wanted:
    """The same with as many tokens as there is room for, or as the model's authors take for the usual limit."""
    # Where there is no room, the engine says so better than a negative number would.
    most = room if usual is None else min(room, usual)
    return dataclasses.replace(wanted, max_tokens=max(most, wanted.min_tokens, 1))


def _seeded(wanted: Wanted, index: int) -> Wanted:
    """The same with the seed of output `index`, so that one seed says for several outputs what each of them is."""
    seed = wanted.sampling.seed
    if seed is None or not index:
        return wanted
    return dataclasses.replace(wanted, sampling=dataclasses.replace(wanted.sampling, seed=derived_seed(seed, index)))
