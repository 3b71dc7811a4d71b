"""What tiers cost and bring on a small machine: a short request beside streams, and a burst, beside plain FCFS.

    python benchmarks/server/fairness.py [--model=smollm2-135m] [--rounds=5]

Two engines in one process, both with one device and the same compiled steps: one with the scheduler and the default
tiers, whatever the machine can keep, one that serves requests in the order in which they come. They take turns:

- a short request comes beside two long streams: seconds until its first token;
- 16 requests come at once: tokens per second of all.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nitsum_jax import LLM

STREAMS, STREAM_TOKENS, BURST, BURST_TOKENS = 2, 250, 16, 32
LIMIT_S, LEAST_SHARE = 1.0, 0.95
PROMPT = "The lighthouse keeper counted the ships that passed before dawn and wrote down their names"


async def beside_streams(llm: LLM, tier: str) -> float:
    """Seconds until the first token of a short request beside streams that are under way."""
    streams = [
        llm.astream(f"{n} {PROMPT}", max_tokens=STREAM_TOKENS, ignore_eos=True, tier=tier) for n in range(STREAMS)
    ]
    for stream in streams:
        for _ in range(3):
            await anext(stream)
    rest = [asyncio.create_task(_drain(stream)) for stream in streams]
    begun = time.monotonic()
    short = llm.astream(f"short: {PROMPT}", max_tokens=4, ignore_eos=True, tier=tier)
    await anext(short)
    waited = time.monotonic() - begun
    await _drain(short)
    await asyncio.gather(*rest)
    return waited


async def _drain(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        pass


def burst(llm: LLM, tier: str, round_: int) -> float:
    """Tokens per second of requests that come at once."""
    prompts = [f"{round_} {n} {PROMPT}" for n in range(BURST)]
    begun = time.monotonic()
    answers = llm.generate(prompts, max_tokens=BURST_TOKENS, ignore_eos=True, tier=tier)
    return sum(len(answer.token_ids) for answer in answers) / (time.monotonic() - begun)


def row(name: str, values: Sequence[float], unit: str) -> str:
    """A line of the table."""
    return f"{name:<44} {min(values):>7.2f} {statistics.median(values):>7.2f} {max(values):>7.2f}  {unit}"


def main() -> None:
    """Runs all rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    settings: dict[str, Any] = {"devices": 1, "max_model_len": 512, "prefix_cache": False}
    waits: list[float] = []
    plain_waits: list[float] = []
    rates: dict[str, list[float]] = {"tiers": [], "fcfs": []}
    shares: list[float] = []
    with LLM(args.model, **settings) as tiers, LLM(args.model, tier_names=("all",), **settings) as fcfs:
        for round_ in range(-1, args.rounds):  # the first warms up
            waited = asyncio.run(beside_streams(tiers, "interactive"))
            plain = asyncio.run(beside_streams(fcfs, "all"))
            pair = burst(tiers, "standard", round_), burst(fcfs, "all", round_)
            if round_ >= 0:
                waits.append(waited)
                plain_waits.append(plain)
                rates["tiers"].append(pair[0])
                rates["fcfs"].append(pair[1])
                shares.append(pair[0] / pair[1])
    print(f"{args.model}, one device, {args.rounds} rounds in turns\n")
    print(f"{'':<44} {'least':>7} {'median':>7} {'most':>7}")
    print(row("first token beside two streams, tiers", waits, "s"))
    print(row("first token beside two streams, FCFS", plain_waits, "s"))
    print(row("16 requests at once, tiers", rates["tiers"], "tokens/s"))
    print(row("16 requests at once, FCFS", rates["fcfs"], "tokens/s"))
    print(row("tiers / FCFS", shares, ""))
    kept = statistics.median(waits) < LIMIT_S and statistics.median(shares) >= LEAST_SHARE
    print(f"\nless than {LIMIT_S:g} s and at least {LEAST_SHARE:.0%}: {'yes' if kept else 'no'}")


if __name__ == "__main__":
    main()
