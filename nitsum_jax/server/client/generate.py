"""nitsum-generate: sends prompts to a server, streams the answers to the terminal, and switches layouts meanwhile."""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Awaitable

import grpc
import grpc.aio
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nitsum_jax.errors import NitsumError
from nitsum_jax.runtime.progress import ProgressLine, duration
from nitsum_jax.server import cli
from nitsum_jax.server.client.calls import CallOutcome, Failure, generate
from nitsum_jax.server.client.channel import open_channel
from nitsum_jax.server.client.flags import ClientOptions, read_options
from nitsum_jax.server.client.layout_plan import PlanRunner
from nitsum_jax.server.client.progress import compiling, watched
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

_NAME = "nitsum-generate"
_POLL_S = 0.2
_WORTH_TELLING_S = 2.0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv))


def main(argv: list[str]) -> int:
    """Runs the tool and returns its exit status."""
    try:
        return asyncio.run(main_async(argv))
    except KeyboardInterrupt:
        return cli.EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, and wants no more of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli.EXIT_FAILED


async def main_async(argv: list[str]) -> int:
    """Like `main`, on a loop that is running."""
    try:
        return await _Client(read_options(argv)).run()
    except (cli.HelpRequested, NitsumError) as why:
        return cli.ended(_NAME, why)


class _Client:
    """One run of the tool."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._exit_code = cli.EXIT_OK
        self._plan: PlanRunner | None = None
        self._within_line = False
        self._streaming = False
        self._stub: nitsum_pb2_grpc.GenerationServiceStub

    async def run(self) -> int:
        options = self._options
        async with open_channel(options.server, options.identity) as channel:
            self._stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
            if options.wait_s is not None and not await self._wait(channel, options.wait_s):
                return cli.EXIT_UNAVAILABLE
            if options.requests:
                await self._generate()
            if options.status:
                await self._status()
        return self._exit_code

    async def _generate(self) -> None:
        plan = PlanRunner(self._options.plan, self._switch)
        self._plan = plan
        for layout in dict.fromkeys(planned.layout for planned in self._options.plan):
            await self._prepare(layout)
        await plan.begin()
        self._streaming = True
        slots = asyncio.Semaphore(self._options.concurrency or len(self._options.requests))

        async def one(index: int, request: nitsum_pb2.GenerateRequest) -> CallOutcome:
            async with slots:
                return await generate(
                    self._stub, index, request, self._options.server, self._options.timeout_s, self._on_delta
                )

        tasks = [asyncio.create_task(one(index, request)) for index, request in enumerate(self._options.requests)]
        try:
            for task in tasks:  # in the order of the prompts, each as soon as those before it are there
                self._show(await task)
        finally:
            for task in tasks:
                task.cancel()
        self._streaming = False
        for missed in await plan.end():
            cli.err(f"{_NAME}: not switched to {missed.layout}: fewer than {missed.tokens} tokens came")

    @property
    def _live(self) -> bool:
        return len(self._options.requests) == 1 and not self._options.json

    def _on_delta(self, text: str, tokens: int) -> None:
        if self._live:
            sys.stdout.write(text)
            sys.stdout.flush()
            self._within_line = not text.endswith("\n") if text else self._within_line
        if self._plan is not None:
            self._plan.count(tokens)

    def _show(self, outcome: CallOutcome) -> None:
        if self._options.json:
            cli.out(json.dumps(outcome.as_json()))
        elif self._live:
            cli.out("")
            self._within_line = False
        else:
            cli.out(f"[{outcome.index + 1}/{len(self._options.requests)}] {outcome.text}")
        for call in () if self._options.json else outcome.tool_calls:
            cli.out(f"{call['name']} {call['arguments']}")
        if outcome.failure is not None:
            which = f"prompt {outcome.index + 1}: " if len(self._options.requests) > 1 else ""
            self._fail(outcome.failure, which)
        elif not self._options.json:
            cli.err(f"({outcome.summary()})")

    async def _prepare(self, layout: str) -> None:
        """Has a planned layout compiled before the streams begin: a switch in their midst should not wait for that."""
        begin = time.monotonic()
        call = self._stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=layout, prepare=True))
        with contextlib.suppress(grpc.aio.AioRpcError):  # what is wrong with the layout, the switch itself will say
            await self._watched(call, f"compiling {layout}", layout)
            if time.monotonic() - begin >= _WORTH_TELLING_S:
                cli.err(f"{_NAME}: {layout} is compiled, after {duration(time.monotonic() - begin)}")

    async def _switch(self, layout: str) -> None:
        call = self._stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=layout))
        try:
            report = await self._watched(call, f"switching to {layout}", layout)
        except grpc.aio.AioRpcError as error:
            self._fail(Failure.of(error, self._options.server), f"switch to {layout}: ")
            return
        self._note(
            f"{_NAME}: switched {report.from_layout} -> {report.to_layout}: {report.sequences} sequences, "
            f"{report.kv_bytes_moved} KV bytes and {report.weight_bytes_moved} weight bytes moved, "
            f"stall {report.stall_ms:.1f} ms"
        )

    async def _watched(
        self, call: Awaitable[nitsum_pb2.SetLayoutResponse], what: str, layout: str
    ) -> nitsum_pb2.SetLayoutResponse:
        """Waits for a call to SetLayout, and shows its progress."""
        # On a terminal that shows the answers too, a line that is written anew would wipe them out.
        rewritten = sys.stderr.isatty() and not (self._streaming and sys.stdout.isatty())
        line = ProgressLine(_NAME, rewritten=rewritten, say=self._note)
        return await watched(call, what, compiling(self._stub, layout), line)

    def _note(self, line: str) -> None:
        """Prints a line beside the output; on a terminal not in the midst of one of the answer's lines."""
        if self._within_line and sys.stdout.isatty() and sys.stderr.isatty():
            line = f"\n{line}"
            self._within_line = False
        cli.err(line)

    async def _status(self) -> None:
        try:
            state = await self._stub.GetLayout(nitsum_pb2.GetLayoutRequest())
        except grpc.aio.AioRpcError as error:
            self._fail(Failure.of(error, self._options.server))
            return
        cli.out(json.dumps(_plain(state), indent=None if self._options.json else 2))

    async def _wait(self, channel: grpc.aio.Channel, limit_s: float) -> bool:
        stub = health_pb2_grpc.HealthStub(channel)
        until = time.monotonic() + limit_s
        while True:
            try:
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return True
                reason = f"the server at {self._options.server} is not ready"
            except grpc.aio.AioRpcError as error:
                reason = Failure.of(error, self._options.server).message
            if time.monotonic() >= until:
                cli.err(f"{_NAME}: {reason} (waited {limit_s:g} s; --wait_seconds sets how long)")
                return False
            await asyncio.sleep(_POLL_S)

    def _fail(self, failure: Failure, which: str = "") -> None:
        self._note(f"{_NAME}: {which}{failure.message} [{failure.code}]")
        if self._exit_code == cli.EXIT_OK:
            self._exit_code = failure.exit_code


def _plain(state: nitsum_pb2.GetLayoutResponse) -> dict[str, object]:
    """The message as JSON values; counters as numbers, where protobuf's own form writes 64-bit ones as text."""
    plain: dict[str, object] = json_format.MessageToDict(
        state, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    plain["stats"] = {field.name: getattr(state.stats, field.name) for field in state.stats.DESCRIPTOR.fields}
    return plain


if __name__ == "__main__":
    run()
