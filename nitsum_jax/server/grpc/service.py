"""The gRPC methods: thin translations between messages, the router and the engine."""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from grpc.aio import ServicerContext

from nitsum_jax.engine.request import FinishReason, TokenLogprob
from nitsum_jax.errors import InvalidInputError, PreconditionError
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.runtime.backend import ServingLoad, ServingStats
from nitsum_jax.runtime.calls import Call, check, compiled, encode, make_call
from nitsum_jax.runtime.streams.output import End, Output
from nitsum_jax.runtime.streams.router import DeltaStream
from nitsum_jax.runtime.tools.offer import begins_thinking
from nitsum_jax.runtime.tools.parts import CallArguments, CallBegun, Part, Said, Thought
from nitsum_jax.runtime.tools.reader import AnswerReader
from nitsum_jax.server.gateway import gateway_headers, header_pairs
from nitsum_jax.server.grpc.embedding import embed
from nitsum_jax.server.grpc.layout_change import outcome
from nitsum_jax.server.grpc.prompts import read_form, read_offer, read_prompt, read_wanted, splits
from nitsum_jax.server.grpc.status import reported
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.server.state import ServerState

if TYPE_CHECKING:
    from nitsum_jax.engine.batching.pacing import Pace
    from nitsum_jax.engine.executables.progress import CompileProgress

SERVICE_NAME = nitsum_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name

_REASONS = {
    FinishReason.STOP: nitsum_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: nitsum_pb2.FINISH_REASON_LENGTH,
}
_STATS = tuple(nitsum_pb2.EngineStats.DESCRIPTOR.fields_by_name)
_REPORT = tuple(nitsum_pb2.SetLayoutResponse.DESCRIPTOR.fields_by_name)


class GenerationService(nitsum_pb2_grpc.GenerationServiceServicer):
    """nitsum.v1.GenerationService over one engine."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def Generate(self, message: nitsum_pb2.GenerateRequest, context: ServicerContext) -> None:
        """Streams the continuation of one prompt; see nitsum.proto."""
        arrival_s = time.monotonic()
        async with reported(context, "Generate", self._retry_after_s):
            backend = self._state.admitting()
            remaining_s: float | None = context.time_remaining()
            deadline_s = None if remaining_s is None else arrival_s + remaining_s
            wanted = read_wanted(message, deadline_s, backend.model.defaults)
            scored = message.prompt_logprobs if message.HasField("prompt_logprobs") else None
            check(wanted, backend.model.vocab_size, least_tokens=1 if scored is None else 0)
            form, offer = read_form(message), read_offer(message)
            if (problem := offer.problem(backend.model)) is not None:
                raise (PreconditionError if problem.of_model else InvalidInputError)(problem.message)
            (ids,) = await encode([read_prompt(message)], backend.model)
            thinking = splits(message) and begins_thinking(backend.model, ids)
            named = offer.form(backend.model, None if form is None else ("form", form), thinking)
            if named is not None:
                wanted = dataclasses.replace(wanted, form=await compiled(named[1], backend.model))
            reader = offer.reader(backend.model, thinking) if splits(message) else None
            backend = self._state.admitting()  # it may have begun to drain meanwhile
            tiers = backend.engine.tier_names
            asked = gateway_headers(header_pairs(context.invocation_metadata()))
            call = asked.applied(
                make_call(wanted, ids, backend.model, tiers), None if message.tier else asked.tier(tiers)
            )
            queued_before = backend.engine.stats().waiting
            with backend.router.stream(backend.engine, call.request, arrival_s=arrival_s) as stream:
                await context.write(_started(call, message.return_prompt_ids, queued_before))
                output = Output(
                    call,
                    backend.model.tokenizer.stream(call.skip_special, call.shown),
                    backend.engine.cancel,
                    arrival_s,
                )
                told = _Told(message.logprobs if message.HasField("logprobs") else None, scored)
                await _relay(output, stream, call, context, told, None if reader is None else reader())

    async def Embed(self, message: nitsum_pb2.EmbedRequest, context: ServicerContext) -> nitsum_pb2.EmbedResponse:
        """Makes vectors of texts; see nitsum.proto."""
        async with reported(context, "Embed", self._retry_after_s):
            return await embed(message, context, self._state)
        raise AssertionError("unreachable: reported() ends the call")

    async def GetLayout(
        self, message: nitsum_pb2.GetLayoutRequest, context: ServicerContext
    ) -> nitsum_pb2.GetLayoutResponse:
        """Tells the layout in force and what else there could be; see nitsum.proto."""
        del message
        async with reported(context, "GetLayout", self._retry_after_s):
            backend = self._state.present()
            layout = backend.engine.layout()
            stats = backend.engine.stats()
            return nitsum_pb2.GetLayoutResponse(
                model=backend.model.name,
                layout=str(layout),
                instances=_instances(layout, backend.engine.loads()),
                allowed_layouts=backend.engine.allowed_layouts(),
                ready_layouts=backend.engine.ready_layouts(),
                devices=backend.engine.device_names,
                stats=nitsum_pb2.EngineStats(**{name: getattr(stats, name) for name in _STATS}),
                tiers=backend.engine.tier_names,
                vocab_size=backend.model.vocab_size,
                pace=_pace(backend.pace, stats),
                control_cpu_seconds=0.0 if backend.control is None else backend.control.cpu_s,
                compiling=_compiling(backend.engine.compiling()),
            )
        raise AssertionError("unreachable: reported() ends the call")

    async def SetLayout(
        self, message: nitsum_pb2.SetLayoutRequest, context: ServicerContext
    ) -> nitsum_pb2.SetLayoutResponse:
        """Switches the layout under live streams; see nitsum.proto."""
        async with reported(context, "SetLayout", self._retry_after_s):
            backend = self._state.admitting()
            if not message.layout:
                raise InvalidInputError('layout is empty: give one such as "tp2+tp1x2"')
            change = backend.engine.prepare_layout if message.prepare else backend.engine.set_layout
            report = await outcome(change(message.layout))
            return nitsum_pb2.SetLayoutResponse(**{name: getattr(report, name) for name in _REPORT})
        raise AssertionError("unreachable: reported() ends the call")

    def _retry_after_s(self) -> float:
        return self._state.present().router.retry_after_s()


class _Told(NamedTuple):
    """How many of the likeliest tokens are told beside those of the output, and of the prompt; None: nothing is."""

    output: int | None
    prompt: int | None


async def _relay(
    output: Output,
    stream: DeltaStream,
    call: Call,
    context: ServicerContext,
    wanted: _Told,
    reader: AnswerReader | None,
) -> None:
    """Writes deltas until the request ends, then the final message."""
    end: End | None = None
    while end is None:
        # A client that reads slowly gets fewer, larger messages.
        piece = output.take(await stream.next())
        end = piece.end
        if piece.ids or piece.text or piece.told or (reader is not None and end is not None):
            delta = nitsum_pb2.TokenDelta(text=piece.text, token_ids=piece.ids)
            if wanted.output is not None:
                delta.logprobs.extend(_logprob(told.id, told.logprob, wanted.output) for told in piece.told)
            if reader is not None:
                _split(delta, reader.push(piece.text) + (reader.finish() if end is not None else []))
            await context.write(nitsum_pb2.GenerateResponse(delta=delta))
    finished = nitsum_pb2.Finished(
        finish_reason=_REASONS[end.reason],
        usage=nitsum_pb2.Usage(
            prompt_tokens=len(call.prompt_ids),
            output_tokens=output.times.tokens,
            cached_tokens=output.cached_tokens,
        ),
        ttft_ms=output.times.ttft_ms,
        tpot_ms=output.times.tpot_ms,
        stop=end.stop,
    )
    if wanted.prompt is not None:
        scores = zip(call.prompt_ids[1:], output.prompt_logprobs, strict=False)
        finished.prompt_logprobs.extend(_logprob(token, one, wanted.prompt) for token, one in scores)
    await context.write(nitsum_pb2.GenerateResponse(finished=finished))


def _split(delta: nitsum_pb2.TokenDelta, parts: Sequence[Part]) -> None:
    """Puts the parts of an answer in their fields."""
    delta.text = "".join(part.text for part in parts if isinstance(part, Said))
    delta.reasoning = "".join(part.text for part in parts if isinstance(part, Thought))
    for part in parts:
        match part:
            case CallBegun(index, name):
                delta.tool_calls.add(index=index, name=name)
            case CallArguments(index, text):
                delta.tool_calls.add(index=index, arguments=text)


def _logprob(token: int, told: TokenLogprob, count: int) -> nitsum_pb2.TokenLogprob:
    top = [nitsum_pb2.LikelyToken(token_id=other, logprob=value) for other, value in told.top[:count]]
    return nitsum_pb2.TokenLogprob(token_id=token, logprob=told.logprob, top=top)


def _started(call: Call, return_prompt_ids: bool, queued_before: int) -> nitsum_pb2.GenerateResponse:
    started = nitsum_pb2.Started(
        request_id=call.request.id,
        prompt_tokens=len(call.prompt_ids),
        prompt_ids=call.prompt_ids if return_prompt_ids else (),
        queued_before=queued_before,
        tier=call.request.tier,
        seed=call.request.sampling.seed,
    )
    return nitsum_pb2.GenerateResponse(started=started)


def _instances(layout: Layout, loads: Sequence[ServingLoad]) -> list[nitsum_pb2.Instance]:
    """The instances of a layout; how busy they are is left out while a switch replaces them."""
    found = {load.devices: load for load in loads}
    out = []
    for instance in layout.instances:
        message = nitsum_pb2.Instance(devices=instance.devices, tp=instance.tp, role=str(instance.role))
        load = found.get(tuple(instance.devices))
        if load is not None:
            message.running, message.kv_use = load.running, load.kv_use
        out.append(message)
    return out


def _compiling(progress: "CompileProgress") -> nitsum_pb2.Compiling:
    return nitsum_pb2.Compiling(
        making=[nitsum_pb2.Making(**dataclasses.asdict(one)) for one in progress.making],
        queued=progress.queued,
        layouts=[nitsum_pb2.PendingLayout(**dataclasses.asdict(one)) for one in progress.layouts],
    )


def _pace(pace: "Pace | None", stats: ServingStats) -> nitsum_pb2.Pace | None:
    if pace is None:
        return None
    return nitsum_pb2.Pace(
        profile=pace.name,
        time_scale=pace.time_scale,
        late_steps=stats.pace_late_steps,
        late_limit=pace.late_limit,
    )
