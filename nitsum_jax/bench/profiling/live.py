"""What only a running engine shows: the host's part of a switch, and what a step takes beyond its executable."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np

from nitsum_jax.bench.streams import Streams
from nitsum_jax.engine.engine import Engine

PROMPT = 16
_BEFORE, _AFTER = 4, 10
# More than a walk takes.
_TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Live:
    """Of streams under an engine.

    Attributes:
      switch_host_s: median of the host's part of the switches between the layouts.
      gap_s: for each TP, the median time between two tokens of a stream.
      context: tokens that a stream had when half of that was measured.
    """

    switch_host_s: float
    gap_s: dict[int, float]
    context: int


def walk(engine: Engine, streams: Streams, tps: Sequence[int], live: int) -> Live:
    """Streams tokens while one instance takes every TP in turn, and the first again.

    Raises:
      PreconditionError: a stream ended before the end of the walk.
    """
    engine.set_layout(f"tp{tps[0]}").result()
    names = streams.start(engine, live, PROMPT, _TOKENS, seed=0)
    streams.wait(dict.fromkeys(names, _BEFORE))
    hosts, gaps, half = [], {}, 0
    for index, tp in enumerate((*tps, tps[0])):
        if index:
            hosts.append(engine.set_layout(f"tp{tp}").result().host_ms / 1000)
        seen = {name: streams.count(name) for name in names}
        streams.wait({name: count + _AFTER for name, count in seen.items()})
        # The first gap after a switch is the switch's.
        gaps[tp] = float(np.median([np.diff(streams.times(name))[count + 1 :] for name, count in seen.items()]))
        if index == len(tps) // 2:
            half = PROMPT + min(seen.values())
    streams.stop(engine, names)
    return Live(statistics.median(hosts) if hosts else 0.0, gaps, half)
