"""Overload, and the loss of a device, in a running server at the pace of an accelerator.

    python benchmarks/server/live.py [--profile=qwen2.5-32b-h100] [--time_scale=8] [--layout=tp4x2] [--seconds=12]

One paced server of 8 emulated devices with the layout held, three loads of chat (tight targets) and code (relaxed):
chat alone at twice the rate, which is what it could attain; chat and code at twice the rate; and both at the plain rate
while the device of an instance is lost for a third of the time.  For each it prints attainment and goodput, and whether
every stream came to its end with all its tokens and no more.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Coroutine

import grpc.aio

from nitsum_jax.bench.demo.load import TIERS, DemoPhase, demo_load
from nitsum_jax.bench.demo.server import child, settled
from nitsum_jax.bench.serve.player import Player
from nitsum_jax.bench.serve.results import Results
from nitsum_jax.bench.serve.session import Session, drive
from nitsum_jax.control.tiers import tiers_toml
from nitsum_jax.errors import NitsumError
from nitsum_jax.server.proto import admin_pb2, admin_pb2_grpc, nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.sim.workloads.workload import Workload

READY_S = 900.0
Beside = Callable[[float], Coroutine[None, None, None]]
TIGHT, RELAXED = "chat", "code"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="qwen2.5-32b-h100")
    parser.add_argument("--time_scale", type=float, default=8.0)
    parser.add_argument("--layout", default="tp4x2")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load, on the target's clock")
    parser.add_argument("--chat", type=float, default=8.0, help="requests per second at the plain rate")
    parser.add_argument("--code", type=float, default=9.0, help="likewise")
    parser.add_argument("--json", help="file that gets all figures")
    return parser.parse_args()


def load(args: argparse.Namespace, scale: float) -> Workload:
    """Chat and code, at a multiple of the plain rate."""
    return demo_load(args.seconds, scale, 1, (DemoPhase("mixed", args.chat, args.code),))


def only(workload: Workload, tier: str) -> Workload:
    """Its requests of one tier."""
    return dataclasses.replace(workload, requests=tuple(r for r in workload.requests if r.tier == tier))


async def run(args: argparse.Namespace) -> dict[str, Results]:
    """All loads on one server."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nitsum-live-"))
    tiers = folder / "tiers.toml"
    tiers.write_text(tiers_toml(TIERS), encoding="utf-8")
    double, plain = load(args, 2.0), load(args, 1.0)
    longest = max(r.prompt_tokens + r.output_tokens for r in (*double.requests, *plain.requests))
    flags = [
        "--model=tiny-random",
        "--devices=8",
        f"--layout={args.layout}",
        f"--pace={args.profile}",
        f"--time_scale={args.time_scale:g}",
        f"--tiers={tiers}",
        "--planner=off",
        "--max_batch=64",
        "--max_queue=100000",
        "--prefill_chunk=256",
        "--page_size=128",
        f"--max_model_len={-(-longest // 1024) * 1024}",
        "--noprefix_cache",
    ]
    results: dict[str, Results] = {}
    async with (
        child(flags, folder / "server.log", READY_S) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        await stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=args.layout, prepare=True))
        await settled(stub)
        admin = admin_pb2_grpc.AdminServiceStub(channel)

        async def lose(scale: float) -> None:
            await asyncio.sleep(args.seconds * scale / 3)
            await admin.SetDevice(admin_pb2.SetDeviceRequest(device=0, lost=True))
            await asyncio.sleep(args.seconds * scale / 3)
            await admin.SetDevice(admin_pb2.SetDeviceRequest(device=0, lost=False))

        async def play(name: str, workload: Workload, beside: Beside | None = None) -> None:
            tasks: list[asyncio.Task[None]] = []

            def begun(player: Player, scale: float) -> None:
                if beside is not None:
                    tasks.append(asyncio.create_task(beside(scale)))

            results[name] = await drive(channel, Session(workload, TIERS), begun=begun)
            for task in tasks:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            state = await stub.GetLayout(nitsum_pb2.GetLayoutRequest())
            whole = state.stats.blocks_free == state.stats.blocks_total
            print(f"\n{name} ({len(workload.requests)} requests), layout {state.layout}, all blocks free: {whole}")
            print(results[name].table(), flush=True)

        await play("chat alone, twice the rate", only(double, TIGHT))
        await play("chat and code, twice the rate", double)
        await play("plain rate, a device lost in between", plain, lose)
    return results


def main() -> None:
    """Runs and tells."""
    args = options()
    results = asyncio.run(run(args))
    alone, both, _ = results.values()
    kept = both.metrics.tiers[TIGHT].goodput / alone.metrics.tiers[TIGHT].goodput
    print(f"\nunder overload the tight tier keeps {kept:.1%} of what it attains alone")
    lost = sum(sum(one.errors.values()) for one in results.values())
    print(f"streams that did not come to their end with exactly their tokens: {lost}")
    if args.json:
        values = {name: one.to_json() for name, one in results.items()}
        pathlib.Path(args.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except NitsumError as error:
        sys.exit(f"live: {error}")
