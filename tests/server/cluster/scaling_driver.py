"""One cell becomes three and one again, under streams; run by test_scaling.py as a process of its own.

Prints a line of JSON: how many cells there were, and how many of the streams came whole.
"""

import asyncio
import dataclasses
import json
import sys

from nitsum_jax.cluster import flags
from nitsum_jax.cluster.main import engine_of, follow
from nitsum_jax.cluster.on_ray import ray_cluster
from nitsum_jax.engine.request import FinishReason, Request, SamplingParams
from nitsum_jax.runtime.streams.router import StreamRouter

TOKENS = 300
WAIT_S = 500.0


async def stream(router: StreamRouter, engine: "object", number: int) -> tuple[int, ...]:
    """The tokens of a sampled request."""
    request = Request(f"r{number}", (3 + number % 40, 5, 7), TOKENS, SamplingParams(1.0, seed=number % 4), tier="batch")
    found: list[int] = []
    with router.stream(engine, request) as deltas:  # type: ignore[arg-type]
        while True:
            for delta in await asyncio.wait_for(deltas.next(), WAIT_S):
                found += delta.token_ids
                if delta.finish_reason is not None:
                    assert delta.finish_reason is FinishReason.LENGTH, delta
                    return tuple(found)


async def main(argv: list[str]) -> None:
    """Scales, with streams all the time."""
    options = flags.read(argv)
    ray_cluster.prepare(options)
    ray_cluster.connect(options)
    deployed = ray_cluster.Deployed(options)
    router = StreamRouter(asyncio.get_running_loop())
    engine = engine_of(options, options.serve, options.serve.model, router.sink, router.admitted, deployed.close)
    try:
        follow(engine, deployed.handle)
        await asyncio.to_thread(deployed.wait, lambda s: engine.wait_for_cells(options.cells, s), WAIT_S)
        seen = [len(engine.cells())]
        answers: list[tuple[int, ...]] = []
        for number, cells in enumerate((3, 1)):
            deployed.deploy(dataclasses.replace(options, cells=cells))
            async with asyncio.timeout(WAIT_S):
                while [*engine.cells().values()] != ["serving"] * cells:
                    answers += await asyncio.gather(*(stream(router, engine, 100 * number + n) for n in range(8)))
            seen.append(len(engine.cells()))
        answers += await asyncio.gather(*(stream(router, engine, 900 + n) for n in range(4)))
        whole = sum(len(answer) == TOKENS for answer in answers)
        print(json.dumps({"cells": seen, "streams": len(answers), "whole": whole}), flush=True)
    finally:
        await asyncio.to_thread(engine.close)


if __name__ == "__main__":
    asyncio.run(main(["nitsum-cluster", *sys.argv[1:]]))
