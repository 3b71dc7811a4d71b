"""From EmbedRequest messages to the engine, and back."""

import time

from grpc.aio import ServicerContext

from nitsum_jax.errors import InvalidInputError
from nitsum_jax.runtime.calls import MAX_OUTPUTS, Prompt, TextPrompt, TokenPrompt, embedding_calls
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.server.gateway import gateway_headers, header_pairs
from nitsum_jax.server.proto import nitsum_pb2
from nitsum_jax.server.state import ServerState


async def embed(
    message: nitsum_pb2.EmbedRequest, context: ServicerContext, state: ServerState
) -> nitsum_pb2.EmbedResponse:
    """Answers one call.

    Raises:
      NitsumError, DeadlineError, GenerationError: it is wrong, or something failed.
    """
    arrival_s = time.monotonic()
    backend = state.admitting()
    remaining_s: float | None = context.time_remaining()
    asked = gateway_headers(header_pairs(context.invocation_metadata()))
    calls = await embedding_calls(
        _texts(message),
        backend,
        tier=message.tier or asked.tier(backend.engine.tier_names) or "",
        ttft_ms=message.ttft_ms if message.HasField("ttft_ms") else asked.ttft_ms,
        tpot_ms=asked.tpot_ms,
        deadline_s=None if remaining_s is None else arrival_s + remaining_s,
    )
    backend = state.admitting()  # it may have begun to drain meanwhile
    with Outputs(calls, backend, arrival_s) as outputs:
        while outputs.alive:
            await outputs.next()
    return nitsum_pb2.EmbedResponse(
        embeddings=[nitsum_pb2.Embedding(values=outputs.embedding(index)) for index in range(len(calls))],
        usage=nitsum_pb2.Usage(
            prompt_tokens=sum(len(call.prompt_ids) for call in calls), cached_tokens=sum(outputs.cached_tokens)
        ),
    )


def _texts(message: nitsum_pb2.EmbedRequest) -> list[Prompt]:
    if not 1 <= len(message.inputs) <= MAX_OUTPUTS:
        raise InvalidInputError(f"there are {len(message.inputs)} inputs: give 1 to {MAX_OUTPUTS}")
    return [_text(one, index) for index, one in enumerate(message.inputs)]


def _text(one: nitsum_pb2.EmbedInput, index: int) -> Prompt:
    match one.WhichOneof("input"):
        case "text" if one.text:
            return TextPrompt(one.text)
        case "tokens" if one.tokens.ids:
            return TokenPrompt(one.tokens.ids)
        case _:
            raise InvalidInputError(f"input {index} is empty: set text or tokens")
