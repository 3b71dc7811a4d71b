"""A server beside the simulator, which knows it by a profile.

    python benchmarks/server/fidelity.py [--model=smollm2-135m] [--devices=2] [--layout=tp2] [--rate=1] [--seconds=60]
    python benchmarks/server/fidelity.py --pace=llama-3.1-8b-h100 --fused_steps=on [--time_scale=16] [--layout=tp1]

Measures the profile (unless --profile names one), starts a server that holds the layout, plays chats to it, simulates
the same requests with that profile and layout, and prints both.  Nothing is paced: the figures are of this machine, and
what else it does meanwhile is in one of them and not in the other.

With --pace the server keeps the pace of a profile instead, with a tiny model and longer chats, and both take prompts
and decoding as one step or apart: what differs is how engine and simulator schedule.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import grpc.aio

from nitsum_jax.bench.demo.load import DemoPhase, demo_load
from nitsum_jax.bench.demo.prediction import predict, static_policy
from nitsum_jax.bench.demo.server import child, settled
from nitsum_jax.bench.serve.results import Results
from nitsum_jax.bench.serve.session import Session, capped, drive
from nitsum_jax.control.model.cost_model import CostModel
from nitsum_jax.control.tiers import Tier, TierSet, tiers_toml
from nitsum_jax.errors import NitsumError, UnavailableError
from nitsum_jax.profiles import load_profile
from nitsum_jax.server.proto import nitsum_pb2, nitsum_pb2_grpc
from nitsum_jax.sim.policies.baselines import Setting
from nitsum_jax.sim.runs.metrics import Metrics
from nitsum_jax.sim.workloads.workload import Workload

READY_S = 900.0
MAX_BATCH = 32
SHAPE = (f"--max_batch={MAX_BATCH}", "--prefill_chunk=128", "--page_size=16", "--max_model_len=1024")
PACED_SHAPE = (f"--max_batch={MAX_BATCH}", "--prefill_chunk=256", "--page_size=128", "--max_model_len=4096")
LONGEST, PACED_LONGEST = (256, 64), (3072, 512)  # prompt and output of a chat, tokens


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layout", default="tp2", help="one instance: several would share the processor's cores")
    parser.add_argument("--profile", help="file of an earlier run; measured first if not given")
    parser.add_argument("--pace", help="profile at whose pace the server runs; nothing is measured then")
    parser.add_argument("--time_scale", type=float, default=16.0, help="with --pace: seconds here for one of its own")
    parser.add_argument(
        "--fused_steps", choices=["on", "off"], default="on", help="with --pace: prompts and decoding in one step"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="chats per second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load")
    parser.add_argument("--ttft_ms", type=float, default=1000.0)
    parser.add_argument("--tpot_ms", type=float, default=200.0)
    parser.add_argument("--json", help="file that gets all figures")
    return parser.parse_args(argv)


def measured(args: argparse.Namespace, folder: pathlib.Path) -> pathlib.Path:
    """The file of the profile, measured if need be."""
    if args.profile:
        return pathlib.Path(args.profile)
    path = folder / "profile.json"
    command = [sys.executable, "-m", "nitsum_jax.bench.profiling.main", f"--model={args.model}", f"--out={path}"]
    command += [f"--devices={args.devices}", f"--layout={args.layout}", "--quick", *SHAPE]
    if subprocess.run(command, check=False).returncode:
        raise UnavailableError("nitsum-profile measured nothing; what it said stands above")
    return path


async def live(args: argparse.Namespace, folder: pathlib.Path, workload: Workload, tiers: TierSet) -> Results:
    """Plays the load to a server."""
    file = folder / "tiers.toml"
    file.write_text(tiers_toml(tiers), encoding="utf-8")
    flags = [f"--model={args.model}", f"--devices={args.devices}", f"--layout={args.layout}", f"--tiers={file}"]
    if args.pace:
        flags += [f"--pace={args.pace}", f"--time_scale={args.time_scale:g}", f"--fused_steps={args.fused_steps}"]
    # Only this layout: what compiles meanwhile would take the cores.
    flags += [f"--layouts={args.layout}", "--planner=off", "--max_queue=100000", "--noprefix_cache"]
    flags += PACED_SHAPE if args.pace else SHAPE
    async with child(flags, folder / "server.log", READY_S) as address, grpc.aio.insecure_channel(address) as channel:
        stub = nitsum_pb2_grpc.GenerationServiceStub(channel)
        await stub.SetLayout(nitsum_pb2.SetLayoutRequest(layout=args.layout, prepare=True))
        await settled(stub)
        return await drive(channel, Session(workload, tiers))


def table(results: Results, said: Metrics) -> str:
    """Both, and how far the simulator is off."""
    mine, its = results.metrics.total, said.total
    rows = [
        ("attainment, %", 100 * mine.attainment, 100 * its.attainment),
        ("goodput, requests/s", mine.goodput, its.goodput),
        *(
            (f"{name} {q}, ms", getattr(mine, field)[q], getattr(its, field)[q])
            for name, field in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"))
            for q in ("p50", "p99")
        ),
    ]
    lines = ["| | live | simulated | simulated / live |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.2f} | {b:.2f} | {b / a if a else float('nan'):.2f} |" for name, a, b in rows]
    return "\n".join([*lines, *results.invalid])


def main(argv: list[str] | None = None) -> None:
    """Runs and tells."""
    args = options(argv)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="nitsum-fidelity-"))
    tiers = TierSet((Tier("chat", args.ttft_ms, args.tpot_ms),))
    longest = PACED_LONGEST if args.pace else LONGEST
    workload = capped(demo_load(args.seconds, 1.0, 1, (DemoPhase("chat", args.rate, 1e-6),)), *longest)
    workload = dataclasses.replace(workload, requests=tuple(r for r in workload.requests if r.tier == "chat"))
    path = args.pace or measured(args, folder)
    profile = load_profile(str(path))
    if args.pace:
        args.model = "tiny-random"
        profile = dataclasses.replace(profile, mixed_steps=args.fused_steps == "on")
    setting = Setting(CostModel(profile), tiers, args.devices)
    said = predict(setting, workload, static_policy(setting, args.layout), MAX_BATCH)
    results = asyncio.run(live(args, folder, workload, tiers))
    print(f"{args.model}, {args.layout}, {len(workload.requests)} chats in {args.seconds:g} s; profile: {path}")
    print(table(results, said))
    if args.json:
        values = {"live": results.to_json(), "simulated": dataclasses.asdict(said)}
        pathlib.Path(args.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except NitsumError as error:
        sys.exit(f"fidelity: {error}")
