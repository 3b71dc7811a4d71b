"""Plays a workload against a server: every request at its time, hundreds of streams in one process.

Open loop: a request is sent when the workload says so, however many are still alive.  A slow server hence gets the same
load as a fast one, and its queue shows in the times.  The client does as little as it can with each message, and keeps
account of its own lateness: where it was late itself, the figures are not the server's.
"""

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable, Sequence

import grpc
import grpc.aio

from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.sim.workloads.workload import TraceRequest

_TIMEOUT_S = 3600.0


@dataclasses.dataclass(slots=True)
class Played:
    """What came of one request; seconds from the start of the run, on the client's clock.

    Attributes:
      request: what was asked for.
      sent_s: when it was sent; `request.arrival_s * time_scale` was wanted.
      first_s: when its first token came.
      last_s: when its last one came.
      tokens: that came.
      error: status of gRPC if it ended otherwise than complete.
    """

    request: TraceRequest
    sent_s: float = 0.0
    first_s: float | None = None
    last_s: float | None = None
    tokens: int = 0
    error: str | None = None

    @property
    def complete(self) -> bool:
        """Whether all tokens came."""
        return self.error is None and self.tokens == self.request.output_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class PlayedRun:
    """A played workload.

    Attributes:
      played: all requests, in order of arrival.
      wall_s: how long it took.
      lag_p99_s: 99th percentile of how late the client sent.
      cpu_share: processor seconds of the client per second of the run.
    """

    played: list[Played]
    wall_s: float
    lag_p99_s: float
    cpu_share: float


class Player:
    """Sends requests over one channel to one server."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        vocab_size: int,
        *,
        time_scale: float = 1.0,
        seed: int = 0,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> None:
        """Sends nothing yet.

        Args:
          channel: to the server.
          vocab_size: prompts are random token ids below it.
          time_scale: seconds here for a second of the workload (that of a paced server).
          seed: of the prompts.
          progress: called with (sent, ended, alive) about once a second.
        """
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        self._generate = stub.Generate
        self._scale = time_scale
        self._progress = progress
        generator = random.Random(seed)
        # One long random text; prompts are pieces of it that begin at random places.
        self._ids = [generator.randrange(3, vocab_size) for _ in range(1 << 16)]
        self._generator = generator
        self.played: list[Played] = []  # of the last run, also while it goes on
        self._sent = self._ended = 0

    async def play(self, requests: Sequence[TraceRequest]) -> PlayedRun:
        """Sends all requests and waits until they have ended."""
        played = self.played = [Played(request) for request in requests]
        cpu, start = time.process_time(), time.monotonic()
        self._sent = self._ended = 0
        reporting = asyncio.create_task(self._report(len(played)))
        streams = set()
        try:
            for one in played:
                wanted = start + one.request.arrival_s * self._scale
                while (left := wanted - time.monotonic()) > 0:
                    await asyncio.sleep(left)
                task = asyncio.create_task(self._stream(one, start))
                streams.add(task)
                task.add_done_callback(streams.discard)
                self._sent += 1
            if streams:
                await asyncio.wait(list(streams))
        finally:
            reporting.cancel()
            for task in streams:
                task.cancel()
        wall = time.monotonic() - start
        lags = sorted(one.sent_s - one.request.arrival_s * self._scale for one in played)
        lag = lags[min(len(lags) - 1, int(0.99 * len(lags)))] if lags else 0.0
        return PlayedRun(played, wall, lag, (time.process_time() - cpu) / wall)

    async def _stream(self, one: Played, start: float) -> None:
        request = one.request
        message = nitsum_pb2.GenerateRequest(
            tokens=nitsum_pb2.TokenPrompt(ids=self._prompt(request.prompt_tokens)),
            max_tokens=request.output_tokens,
            ignore_eos=True,
            tier=request.tier,
        )
        one.sent_s = time.monotonic() - start
        try:
            async for response in self._generate(message, timeout=_TIMEOUT_S):
                if response.HasField("delta") and response.delta.token_ids:
                    now = time.monotonic() - start
                    if one.first_s is None:
                        one.first_s = now
                    one.last_s = now
                    one.tokens += len(response.delta.token_ids)
        except grpc.aio.AioRpcError as error:
            one.error = error.code().name
        finally:
            self._ended += 1

    def _prompt(self, count: int) -> list[int]:
        if count >= len(self._ids):
            return (self._ids * (count // len(self._ids) + 1))[:count]
        begin = self._generator.randrange(len(self._ids) - count)
        return self._ids[begin : begin + count]

    async def _report(self, total: int) -> None:
        while self._progress is not None:
            self._progress(self._sent, self._ended, self._sent - self._ended)
            await asyncio.sleep(1.0)
