"""The gRPC methods: thin translations between messages, the router and the engine."""

import dataclasses
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from grpc.aio import ServicerContext

from nitsum_jax.engine.request import FinishReason
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.meshes.layout import Layout
from nitsum_jax.runtime.backend import ServingLoad, ServingStats
from nitsum_jax.runtime.calls import Call, check, encode, make_call
from nitsum_jax.runtime.streams.output import End, Output, TokenWithLogprob
from nitsum_jax.runtime.streams.router import DeltaStream
from nitsum_jax.server.gateway import gateway_headers, header_pairs
from nitsum_jax.server.grpc.layout_change import outcome
from nitsum_jax.server.grpc.prompts import read_prompt, read_wanted
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
            check(wanted, backend.model.vocab_size)
            (ids,) = await encode([read_prompt(message)], backend.model)
            backend = self._state.admitting()  # it may have begun to drain meanwhile
            tiers = backend.engine.tier_names
            asked = gateway_headers(header_pairs(context.invocation_metadata()))
            call = asked.applied(
                make_call(wanted, ids, backend.model, tiers), None if message.tier else asked.tier(tiers)
            )
            queued_before = backend.engine.stats().waiting
            with backend.router.stream(backend.engine, call.request, arrival_s=arrival_s) as stream:
                await context.write(_started(call, message.return_prompt_ids, queued_before))
                output = Output(call, backend.model.tokenizer.stream(), backend.engine.cancel, arrival_s)
                await _relay(output, stream, call, context)

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


async def _relay(output: Output, stream: DeltaStream, call: Call, context: ServicerContext) -> None:
    """Writes deltas until the request ends, then the final message."""
    end: End | None = None
    while end is None:
        # A client that reads slowly gets fewer, larger messages.
        piece = output.take(await stream.next())
        end = piece.end
        if piece.ids or piece.text or piece.told:
            logprobs = [_logprob(told) for told in piece.told]
            delta = nitsum_pb2.TokenDelta(text=piece.text, token_ids=piece.ids, logprobs=logprobs)
            await context.write(nitsum_pb2.GenerateResponse(delta=delta))
    finished = nitsum_pb2.Finished(
        finish_reason=_REASONS[end.reason],
        usage=nitsum_pb2.Usage(
            prompt_tokens=len(call.request.prompt_ids),
            output_tokens=output.times.tokens,
            cached_tokens=output.cached_tokens,
        ),
        ttft_ms=output.times.ttft_ms,
        tpot_ms=output.times.tpot_ms,
        stop=end.stop,
    )
    await context.write(nitsum_pb2.GenerateResponse(finished=finished))


def _logprob(told: TokenWithLogprob) -> nitsum_pb2.TokenLogprob:
    top = [nitsum_pb2.LikelyToken(token_id=token, logprob=value) for token, value in told.logprob.top]
    return nitsum_pb2.TokenLogprob(token_id=told.id, logprob=told.logprob.logprob, top=top)


def _started(call: Call, return_prompt_ids: bool, queued_before: int) -> nitsum_pb2.GenerateResponse:
    started = nitsum_pb2.Started(
        request_id=call.request.id,
        prompt_tokens=len(call.request.prompt_ids),
        prompt_ids=call.request.prompt_ids if return_prompt_ids else (),
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
