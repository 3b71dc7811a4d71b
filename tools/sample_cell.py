"""A cell that exists only on paper, for pictures of the dashboard: eight devices, a mix that shifts, two switches."""

import collections
import math
import random
from collections.abc import Iterator

from nitsum_jax.runtime.control.layout_log import LayoutChoice, SwitchNote
from nitsum_jax.server.operations.dashboard.snapshot import DashboardSnapshot, InstanceView, TierView, Totals

_TIERS = (("interactive", 0.5, 0.05), ("standard", 2.0, 0.1), ("batch", 60.0, 1.0))
_SECONDS = 600
_LAYOUTS = ((0, (2, 2, 2, 2)), (215, (4, 2, 2)), (468, (4, 1, 1, 1, 1)))
_REASONS = (
    "start",
    "interactive near its TPOT target (47 of 50 ms at p99): TP 4 for it gains 1.9 req/s, the switch costs 0.02",
    "batch queue of 31 grows, interactive keeps its TP 4: four TP 1 gain 2.4 req/s, the switch costs 0.05",
)


def _text(tps: tuple[int, ...]) -> str:
    return "+".join(f"tp{tp}" if n == 1 else f"tp{tp}x{n}" for tp, n in collections.Counter(tps).items())


def sample(start_s: float) -> Iterator[DashboardSnapshot]:
    """Yields ten minutes, one snapshot per second.

    Args:
      start_s: seconds since 1970 of the first.
    """
    noise = random.Random(7)
    tokens = 0.0
    states = {name: [0.97, rate] for (name, _, _), rate in zip(_TIERS, (5.2, 3.1, 1.4), strict=True)}
    for second in range(_SECONDS + 1):
        phase = sum(second >= at for at, _ in _LAYOUTS) - 1
        tps = _LAYOUTS[phase][1]
        pressed = {"interactive": 150 < second < 215, "batch": 400 < second < 468, "standard": False}
        views = []
        for index, (name, ttft, tpot) in enumerate(_TIERS):
            share, rate = states[name]
            goal = 0.72 if pressed[name] else 0.985 - 0.008 * index
            wave = (5.4, 3.2, 1.5)[index] * (1 + 0.18 * math.sin(second / 70 + index)) * (1.25 if second > 380 else 1)
            share += 0.06 * (goal - share) + noise.gauss(0, 0.004)
            rate += 0.08 * (wave * share - rate) + noise.gauss(0, 0.03)
            states[name] = [min(1.0, share), max(0.0, rate)]
            slow = 1.6 if pressed[name] else 0.8
            views.append(
                TierView(
                    name, ttft, tpot, waiting=(0, 1, 9)[index], running=(11, 8, 14)[index], counted=int(60 * rate),
                    attainment=min(1.0, share), goodput=max(0.0, rate), ttft_p50=ttft * 0.24 * slow,
                    ttft_p99=ttft * 0.9 * slow, tpot_p50=tpot * 0.42 * slow, tpot_p99=tpot * 0.86 * slow,
                )
            )  # fmt: skip
        tokens += 1650 + noise.gauss(0, 60) + 420 * (second > 215) + 260 * (second > 468)
        yield DashboardSnapshot(
            time_s=start_s + second,
            model="llama-3.1-8b-instruct",
            version="sample data",
            phase="serving",
            layout=_text(tps),
            devices=tuple(f"TPU v5e {index}" for index in range(8)),
            instances=tuple(_instances(tps, second)),
            tiers=tuple(views),
            switches=tuple(_switches(start_s, phase)),
            decisions=tuple(
                LayoutChoice(start_s + at, _text(layout), reason, 0.0031 + 0.0004 * n)
                for n, ((at, layout), reason) in enumerate(zip(_LAYOUTS[: phase + 1], _REASONS, strict=False))
            ),
            totals=Totals(10, 33, 256, 0.56, int(tokens), 41_000 + 34 * second, phase, 24, 0.41),
        )


def _instances(tps: tuple[int, ...], second: int) -> Iterator[InstanceView]:
    first = 0
    for index, tp in enumerate(tps):
        use = 0.48 + 0.22 * math.sin(second / 40 + 1.7 * index) + 0.05 * (tp == 4)
        yield InstanceView(tuple(range(first, first + tp)), tp, "mixed", (11, 7, 5, 6, 4)[index], use)
        first += tp


def _switches(start_s: float, phase: int) -> Iterator[SwitchNote]:
    facts = ((0.0043, 17, 182_452_224, 0), (0.0061, 12, 96_468_992, 0))
    for n in range(phase):
        (at, to), (stall, sequences, kv, weights) = _LAYOUTS[n + 1], facts[n]
        yield SwitchNote(start_s + at + 0.2, _text(_LAYOUTS[n][1]), _text(to), stall, sequences, kv, weights)
