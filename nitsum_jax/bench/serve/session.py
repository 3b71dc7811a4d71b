"""One run of the load generator against a server: what the server is, the load, the figures."""

import dataclasses
from collections.abc import Callable, Sequence

import grpc.aio

from nitsum_jax.bench.serve.player import Player
from nitsum_jax.bench.serve.results import Results, results_of
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.errors import InvalidInputError
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.sim.workloads.workload import TraceRequest, Workload

Progress = Callable[[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class Session:
    """How to run.

    Attributes:
      workload: what is sent.
      tiers: targets.
      warm_up_s: requests that arrive before do not count.
      time_scale: seconds here for one of the workload; None: that of the server if it is paced, else 1.
      seed: of the prompts.
    """

    workload: Workload
    tiers: TierSet
    warm_up_s: float = 0.0
    time_scale: float | None = None
    seed: int = 0


def capped(workload: Workload, max_prompt: int | None, max_output: int | None) -> Workload:
    """The workload with no longer prompts and outputs than these; None: as they are."""
    if max_prompt is None and max_output is None:
        return workload
    requests = tuple(
        dataclasses.replace(
            request,
            prompt_tokens=min(request.prompt_tokens, max_prompt or request.prompt_tokens),
            output_tokens=min(request.output_tokens, max_output or request.output_tokens),
        )
        for request in workload.requests
    )
    return dataclasses.replace(workload, requests=requests)


async def drive(
    channel: grpc.aio.Channel,
    session: Session,
    progress: Progress | None = None,
    begun: Callable[[Player, float], None] | None = None,
) -> Results:
    """Plays the workload and works out the figures.

    Args:
      channel: to the server.
      session: what to play.
      progress: told (sent, ended, alive) about once a second.
      begun: told of the player and the time scale before the first request.

    Raises:
      InvalidInputError: the server has not the tiers of the workload.
      grpc.aio.AioRpcError: the server does not answer.
    """
    stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
    before = await stub.GetLayout(nitsum_pb2.GetLayoutRequest(), wait_for_ready=True, timeout=60)
    _check_tiers(session.workload.requests, before.tiers)
    paced = before.HasField("pace")
    scale = session.time_scale or (before.pace.time_scale if paced else 1.0)
    if paced and scale != before.pace.time_scale:
        raise InvalidInputError(
            f"--time_scale={scale:g} must be that of the server, {before.pace.time_scale:g}: leave it out"
        )
    player = Player(channel, before.vocab_size, time_scale=scale, seed=session.seed, progress=progress)
    if begun is not None:
        begun(player, scale)
    run = await player.play(session.workload.requests)
    after = await stub.GetLayout(nitsum_pb2.GetLayoutRequest())
    steps = after.stats.steps - before.stats.steps
    late = (after.pace.late_steps - before.pace.late_steps) / steps if paced and steps else None
    return results_of(
        run,
        session.tiers,
        session.workload.seconds,
        time_scale=scale,
        warm_up_s=session.warm_up_s,
        paced=f"{before.pace.profile}, time_scale {scale:g}" if paced else None,
        late_steps=late,
        late_limit=before.pace.late_limit if paced else 1.0,
        control_share=(after.control_cpu_seconds - before.control_cpu_seconds) / run.wall_s,
    )


def _check_tiers(requests: Sequence[TraceRequest], known: Sequence[str]) -> None:
    for tier in dict.fromkeys(request.tier for request in requests):
        if tier not in known:
            raise InvalidInputError(f"the server has no tier {tier!r}, only {', '.join(known)}: see --tiers")
