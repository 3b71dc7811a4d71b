"""What the front door of nitsum-cluster costs: one cell behind it against the same server directly.

    python benchmarks/server/cluster.py [--streams=64] [--tokens=100] [--rounds=3]

Tokens per second of so many streams at once, and the time to the first token of a request alone. Both serve
tiny-random on one device; a larger model makes the share of the front door smaller.
"""

import argparse
import asyncio
import pathlib
import statistics
import tempfile
import time

import grpc.aio

from nitsum_jax.bench.demo.server import child
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

COMMON = ("--model=tiny-random", "--max_model_len=512", "--max_batch=64")
READY_S = 600.0
SERVERS = {
    "nitsum-serve": ("nitsum_jax.server.launch.main", "--devices=1"),
    "nitsum-cluster, one cell": ("nitsum_jax.cluster.main", "--cells=1", "--devices_per_cell=1"),
    "nitsum-cluster, two cells": ("nitsum_jax.cluster.main", "--cells=2", "--devices_per_cell=1"),
}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(f"| server | tokens/s, {given.streams} streams | TTFT alone, p50, ms |")
    print("|---|---|---|")
    for name, (module, *flags) in SERVERS.items():
        rate, ttft_ms = asyncio.run(_of_server(module, flags, given))
        print(f"| {name} | {rate:.0f} | {ttft_ms:.1f} |", flush=True)


async def _of_server(module: str, flags: list[str], given: argparse.Namespace) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        async with child([*COMMON, *flags], pathlib.Path(folder, "server.log"), READY_S, module) as address:
            return await measure(address, given.streams, given.tokens, given.rounds)


async def measure(address: str, streams: int, tokens: int, rounds: int) -> tuple[float, float]:
    """Best tokens per second of some rounds, and the median time to the first token of single requests."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        await asyncio.gather(*(ask(stub, n, tokens) for n in range(streams)))  # warm
        best = 0.0
        for _ in range(rounds):
            begun = time.perf_counter()
            await asyncio.gather(*(ask(stub, n, tokens) for n in range(streams)))
            best = max(best, streams * tokens / (time.perf_counter() - begun))
        firsts = [await ask(stub, n, 2) for n in range(10 * rounds)]
    return best, 1000 * statistics.median(firsts)


async def ask(stub: nitsum_pb2_grpc.GenerationServiceStub, number: int, tokens: int) -> float:
    """One request to its end; returns the seconds to its first token."""
    prompt = nitsum_pb2.TokenPrompt(ids=[3 + number % 50, *range(5, 40)])
    message = nitsum_pb2.GenerateRequest(tokens=prompt, max_tokens=tokens, ignore_eos=True, tier="batch")
    begun, first_s = time.perf_counter(), 0.0
    async for answer in stub.Generate(message, timeout=600):
        if answer.delta.token_ids and not first_s:
            first_s = time.perf_counter() - begun
    return first_s


if __name__ == "__main__":
    main()
