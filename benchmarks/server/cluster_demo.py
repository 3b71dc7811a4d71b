"""Two cells behind one front door, 32 streams, and kill -9 of a cell in their midst: `make cluster-demo`.

Prints what the front door says and how long streams paused, and exits with 1 unless every stream came whole.
"""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import grpc.aio

from nitsum_jax.bench.demo.server import child
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

STREAMS, TOKENS = 32, 200
READY_S = 600.0
FLAGS = (
    *("--model=tiny-random", "--cells=2", "--devices_per_cell=1"),
    *("--deterministic", "--max_model_len=512", "--log_level=info"),
)
_MARK = f"NITSUM_CLUSTER_DEMO={os.getpid()}"


def main() -> int:
    """Runs the demonstration."""
    name, value = _MARK.split("=")
    os.environ[name] = value  # the cells inherit it
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "cluster.log")
        try:
            return asyncio.run(_run(log))
        finally:
            print("what the front door said:")
            for line in log.read_text(encoding="utf-8").splitlines():
                if "nitsum_jax.requests" not in line:  # one for each stream
                    print(f"  {line[:150]}")


async def _run(log: pathlib.Path) -> int:
    async with child(FLAGS, log, READY_S, "nitsum_jax.cluster.main") as address:
        return await _demonstrate(address)


async def _demonstrate(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        streams = [asyncio.create_task(_stream(stub, number)) for number in range(STREAMS)]
        before = await _tokens(stub)
        while await _tokens(stub) < before + STREAMS * 20:
            await asyncio.sleep(0.05)
        victim = _cells()[0]
        print(f"{STREAMS} streams run; kill -9 {victim}, one of two cells")
        os.kill(victim, signal.SIGKILL)
        ends = await asyncio.gather(*streams, return_exceptions=True)
    whole = [end for end in ends if not isinstance(end, BaseException) and end[0] == TOKENS]
    pauses = sorted(end[1] for end in whole)
    print(f"{len(whole)} of {STREAMS} streams came whole, {TOKENS} tokens each")
    if pauses:
        print(f"longest pause of a stream: median {pauses[len(pauses) // 2]:.2f} s, longest {pauses[-1]:.2f} s")
    for end in ends:
        if isinstance(end, BaseException):
            print(f"  failed: {end}")
    return 0 if len(whole) == STREAMS else 1


async def _stream(stub: nitsum_pb2_grpc.GenerationServiceStub, number: int) -> tuple[int, float]:
    """Tokens that came, and the longest time between two."""
    message = nitsum_pb2.GenerateRequest(
        tokens=nitsum_pb2.TokenPrompt(ids=[3 + number, 5, 7]), max_tokens=TOKENS, ignore_eos=True, tier="batch"
    )
    count, longest_s, last_s = 0, 0.0, None
    async for answer in stub.Generate(message, timeout=300):
        if answer.delta.token_ids:
            now = time.monotonic()
            longest_s = max(longest_s, 0.0 if last_s is None else now - last_s)
            last_s = now
            count += len(answer.delta.token_ids)
    return count, longest_s


async def _tokens(stub: nitsum_pb2_grpc.GenerationServiceStub) -> int:
    return int((await stub.GetLayout(nitsum_pb2.GetLayoutRequest())).stats.tokens_generated)


def _cells() -> list[int]:
    """Processes of this demonstration that hold a cell."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    rows = (line.split(None, 1) for line in listed.splitlines())
    named = [int(pid) for pid, text in rows if text.startswith("ray::ServeReplica:nitsum:Cell")]
    return [pid for pid in named if _MARK.encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes()]


if __name__ == "__main__":
    sys.exit(main())
