"""JetStream's gRPC service over the same engine, so that its clients and its benchmark run unmodified.

Its protocol has no field for how tokens are chosen: one sample is decoded greedily, several are drawn as the model's
generation config says, at temperature 1 if it says nothing. It has no stop strings and no tiers either; the
end-of-sequence ids of the model end an output, and the default tier serves it. The reason of its end is not sent.
"""

import dataclasses
import time
from collections.abc import Sequence

from grpc.aio import ServicerContext

from nitsum_jax.engine.request import SamplingParams
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.models.generation import GenerationDefaults
from nitsum_jax.runtime.backend import Backend, ServingTokenizer
from nitsum_jax.runtime.calls import (
    MAX_OUTPUTS,
    Call,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Wanted,
    check,
    check_outputs,
    default_max_tokens,
    derived_seed,
    encode,
    make_call,
)
from nitsum_jax.runtime.streams.outputs import Outputs
from nitsum_jax.server.gateway import gateway_headers, header_pairs
from nitsum_jax.server.grpc.status import reported
from nitsum_jax.server.proto import jetstream_pb2, jetstream_pb2_grpc
from nitsum_jax.server.state import ServerPhase, ServerState

SERVICE_NAME = jetstream_pb2.DESCRIPTOR.services_by_name["Orchestrator"].full_name

_Content = jetstream_pb2.DecodeResponse.StreamContent


class JetStreamService(jetstream_pb2_grpc.OrchestratorServicer):
    """jetstream_proto.Orchestrator."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def Decode(self, message: jetstream_pb2.DecodeRequest, context: ServicerContext) -> None:
        """Streams the continuation of one prompt; see jetstream.proto."""
        arrival_s = time.monotonic()
        async with reported(context, "Decode", self._retry_after_s):
            backend = self._state.admitting()
            remaining_s: float | None = context.time_remaining()
            deadline_s = None if remaining_s is None else arrival_s + remaining_s
            asked = gateway_headers(header_pairs(context.invocation_metadata()))
            tier = asked.tier(backend.engine.tier_names)
            calls = [asked.applied(call, tier) for call in await _calls(message, backend, deadline_s)]
            backend = self._state.admitting()  # it may have begun to drain meanwhile
            with_text = message.WhichOneof("content") == "text_content"
            with Outputs(calls, backend, arrival_s) as outputs:
                while outputs.alive:
                    samples = [_Content.Sample() for _ in calls]
                    for index, piece in await outputs.next():
                        samples[index] = _Content.Sample(text=piece.text if with_text else "", token_ids=piece.ids)
                    # Clients look at the first sample of every message, and take an empty one for no news.
                    if any(sample.text or sample.token_ids for sample in samples):
                        content = _Content(samples=samples)
                        await context.write(jetstream_pb2.DecodeResponse(stream_content=content))

    async def HealthCheck(
        self, message: jetstream_pb2.HealthCheckRequest, context: ServicerContext
    ) -> jetstream_pb2.HealthCheckResponse:
        """Whether the server takes requests."""
        del message, context
        return jetstream_pb2.HealthCheckResponse(is_live=self._state.phase is ServerPhase.SERVING)

    def _retry_after_s(self) -> float:
        return self._state.present().router.retry_after_s()


async def _calls(message: jetstream_pb2.DecodeRequest, backend: Backend, deadline_s: float | None) -> list[Call]:
    """One call per sample.

    Raises:
      InvalidInputError: the message is wrong; the text names the field.
    """
    if message.lora_adapter_id:
        raise InvalidInputError("lora_adapter_id is not supported: this server has no adapters; leave it empty")
    samples = message.num_samples or 1
    if not 1 <= samples <= MAX_OUTPUTS:
        raise InvalidInputError(f"num_samples={samples} is out of range: give 1 to {MAX_OUTPUTS}")
    check_outputs(samples, backend, f"num_samples={samples}")
    wanted = Wanted(
        sampling=_sampling(samples, backend.model.defaults),
        max_tokens=message.max_tokens or default_max_tokens(backend.model.defaults),
        deadline_s=deadline_s,
    )
    check(wanted, backend.model.vocab_size)
    (ids,) = await encode([_prompt(message, backend.model.tokenizer)], backend.model)
    first = make_call(wanted, ids, backend.model, backend.engine.tier_names)
    return [first, *(_resampled(first, index) for index in range(1, samples))]


def _sampling(samples: int, defaults: GenerationDefaults) -> SamplingParams:
    """Greedy for one sample, as JetStream's servers decode and its benchmark scores; several must differ."""
    if samples == 1:
        return SamplingParams()
    return SamplingParams(**{**defaults.sampling, "temperature": defaults.temperature or 1.0})


def _prompt(message: jetstream_pb2.DecodeRequest, tokenizer: ServingTokenizer) -> Prompt:
    match message.WhichOneof("content"):
        case "text_content":
            return TextPrompt(message.text_content.text, add_special=not message.has_bos)
        case "token_content":
            ids = tuple(message.token_content.token_ids)
            begin = () if message.has_bos else _beginning(tokenizer)
            # Many tokenizers put it there by themselves, and their clients do not say so.
            return TokenPrompt(ids if not ids or ids[: len(begin)] == begin else (*begin, *ids))
        case _:
            raise InvalidInputError("the request has no prompt: set text_content or token_content")


def _beginning(tokenizer: ServingTokenizer) -> tuple[int, ...]:
    """The ids that the model wants before a text."""
    bare: Sequence[int] = tokenizer.encode("a", add_special=False)
    whole: Sequence[int] = tokenizer.encode("a", add_special=True)
    start = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), 0)
    return tuple(whole[:start])


def _resampled(call: Call, index: int) -> Call:
    """The same call for another sample: a request of its own, with a seed that follows from the first one's."""
    request = call.request
    seed = derived_seed(request.sampling.seed or 0, index)
    sampling = dataclasses.replace(request.sampling, seed=seed)
    return dataclasses.replace(
        call, request=dataclasses.replace(request, id=f"{request.id}-{index}", sampling=sampling)
    )
