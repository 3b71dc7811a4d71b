"""What the front door of nitsum-cluster costs, and what more cells are worth.

    python benchmarks/server/cluster.py [--streams=64] [--tokens=100] [--rounds=5]
    python benchmarks/server/cluster.py --goodput [--cells=1,2,3] [--rate=48] [--seconds=5] [--time_scale=48]

The first measures one cell behind a front door against the same server directly, in turn: tokens per second of so many
streams at once, and the time to the first token of a request alone. Both serve tiny-random, whose steps take almost
nothing; a larger model makes the share of the front door smaller. The second plays a load that grows with the cells to
clusters of paced cells (Llama 3.1 8B on one H100 each) and tells their goodput. By default it is 1.3 times what a cell
can do in so short a run, about 37 requests a second in time, so that the goodput is what the cells can do and not what
is asked of them.
"""

import argparse
import asyncio
import contextlib
import pathlib
import statistics
import tempfile
import time

import grpc.aio

from nitsum_jax.bench.demo.load import DemoPhase, demo_load
from nitsum_jax.bench.demo.server import child
from nitsum_jax.bench.serve.session import Session, capped, drive
from nitsum_jax.control.tiers import Tier, TierSet, tiers_toml
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc

CLUSTER = "nitsum_jax.cluster.main"
COMMON = ("--model=tiny-random", "--max_model_len=512", "--max_batch=64")
READY_S = 600.0
SERVERS = {
    "nitsum-serve": ("nitsum_jax.server.launch.main", "--devices=1"),
    "nitsum-cluster, one cell": (CLUSTER, "--cells=1", "--devices_per_cell=1"),
}
TIERS = TierSet((Tier("chat", 500, 20), Tier("code", 5000, 100)))
PACED = (
    *("--model=tiny-random", "--pace=llama-3.1-8b-h100", "--devices_per_cell=1", "--layout=tp1", "--layouts=tp1"),
    *("--max_batch=32", "--prefill_chunk=256", "--page_size=64", "--max_model_len=2048", "--planner=off"),
    *("--max_queue=100000", "--noprefix_cache"),
)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--goodput", action="store_true", help="of paced cells, instead of the cost")
    parser.add_argument("--cells", default="1,2,3", help="with --goodput: numbers of cells")
    parser.add_argument("--rate", type=float, default=48.0, help="with --goodput: requests per second and cell")
    parser.add_argument("--seconds", type=float, default=5.0, help="with --goodput: of the load, on the paced clock")
    parser.add_argument("--time_scale", type=float, default=48.0, help="with --goodput: seconds here for one of a cell")
    given = parser.parse_args()
    asyncio.run(goodput(given) if given.goodput else cost(given))


async def cost(given: argparse.Namespace) -> None:
    """Front door against server, in rounds that take turns."""
    async with contextlib.AsyncExitStack() as stack:
        stubs = {}
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, (name, (module, *flags)) in enumerate(SERVERS.items()):
            log = folder / f"server-{number}.log"
            address = await stack.enter_async_context(child([*COMMON, *flags], log, READY_S, module))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            stubs[name] = nitsum_pb2_grpc.GenerationServiceStub(channel)
            await rate_of(stubs[name], given)  # warm
        rates: dict[str, list[float]] = {name: [] for name in SERVERS}
        firsts: dict[str, list[float]] = {name: [] for name in SERVERS}
        for number in range(given.rounds):
            for name in list(SERVERS)[:: 1 if number % 2 else -1]:
                rates[name].append(await rate_of(stubs[name], given))
                firsts[name] += [await ask(stubs[name], n, 2) for n in range(10)]
    print(f"| server | tokens/s, {given.streams} streams | TTFT alone, p50, ms |")
    print("|---|---|---|")
    for name in SERVERS:
        print(f"| {name} | {statistics.median(rates[name]):.0f} | {1000 * statistics.median(firsts[name]):.1f} |")
    alone, behind = rates.values()
    kept = statistics.median(b / a for a, b in zip(alone, behind, strict=True))
    print(f"kept, median of {given.rounds} rounds: {kept:.0%}")


async def rate_of(stub: nitsum_pb2_grpc.GenerationServiceStub, given: argparse.Namespace) -> float:
    """Tokens per second of all streams."""
    begun = time.perf_counter()
    await asyncio.gather(*(ask(stub, n, given.tokens) for n in range(given.streams)))
    return float(given.streams * given.tokens / (time.perf_counter() - begun))


async def ask(stub: nitsum_pb2_grpc.GenerationServiceStub, number: int, tokens: int) -> float:
    """One request to its end; returns the seconds to its first token."""
    prompt = nitsum_pb2.TokenPrompt(ids=[3 + number % 50, *range(5, 40)])
    message = nitsum_pb2.GenerateRequest(tokens=prompt, max_tokens=tokens, ignore_eos=True, tier="batch")
    begun, first_s = time.perf_counter(), 0.0
    async for answer in stub.Generate(message, timeout=600):
        if answer.delta.token_ids and not first_s:
            first_s = time.perf_counter() - begun
    return first_s


async def goodput(given: argparse.Namespace) -> None:
    """Paced cells under a load that grows with them."""
    print("| cells | requests/s | goodput/s | attainment | goodput of one cell, times |")
    print("|---|---|---|---|---|")
    first = None
    for cells in map(int, given.cells.split(",")):
        phase = DemoPhase("steady", 0.8 * given.rate * cells, 0.2 * given.rate * cells)
        workload = capped(demo_load(given.seconds, 1.0, 1, (phase,)), 1024, 128)
        with tempfile.TemporaryDirectory() as name:
            tiers = pathlib.Path(name, "tiers.toml")
            tiers.write_text(tiers_toml(TIERS), encoding="utf-8")
            flags = [*PACED, f"--cells={cells}", f"--tiers={tiers}", f"--time_scale={given.time_scale:g}"]
            async with (
                child(flags, pathlib.Path(name, "server.log"), READY_S, CLUSTER) as address,
                grpc.aio.insecure_channel(address) as channel,
            ):
                results = await drive(channel, Session(workload, TIERS))
        total = results.metrics.total
        first = first or total.goodput / cells
        rate = len(workload.requests) / given.seconds
        print(
            f"| {cells} | {rate:.1f} | {total.goodput:.2f} | {total.attainment:.1%} | {total.goodput / first:.2f} |",
            *results.invalid,
            flush=True,
        )


if __name__ == "__main__":
    main()
