"""The tables at the end: adaptive against static layouts, and the running cell against the simulator."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nitsum_jax.bench.serve.results import Results
from nitsum_jax.sim.runs.metrics import Metrics

ADAPTIVE = "adaptive"


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A policy, what it came to live, and what the simulator said of it."""

    policy: str
    live: Results
    simulated: Metrics
    switches: int


def gain(entries: Sequence[Entry]) -> float | None:
    """Goodput of adaptive control over that of the best static layout; None if there is nothing to compare."""
    mine = [e.live.metrics.total.goodput for e in entries if e.policy == ADAPTIVE]
    static = [e.live.metrics.total.goodput for e in entries if e.policy != ADAPTIVE]
    return mine[0] / max(static) if mine and static and max(static) > 0 else None


def tables(entries: Sequence[Entry], pace: str) -> str:
    """For people."""
    tiers = [name for name, tier in entries[0].live.metrics.tiers.items() if tier.requests]
    rows = [["policy", "goodput/s", "attainment", *tiers, "switches", "late steps", "valid"]]
    for entry in sorted(entries, key=lambda e: -e.live.metrics.total.goodput):
        metrics = entry.live.metrics
        shares = [f"{metrics.tiers[name].attainment:.1%}" for name in tiers]
        total = metrics.total
        valid = "yes" if not entry.live.invalid else "NO"
        late = "-" if entry.live.late_steps is None else f"{entry.live.late_steps:.1%}"
        rows.append(
            [entry.policy, f"{total.goodput:.2f}", f"{total.attainment:.1%}", *shares, str(entry.switches), late, valid]
        )
    lines = [f"PACED at {pace}: no figure is of this machine", "", *_aligned(rows)]
    found = gain(entries)
    if any(entry.live.invalid for entry in entries):
        lines.append("runs are invalid (see below): the comparison says nothing")
    elif found is not None:
        lines.append(f"adaptive control has {found:.2f} times the goodput of the best static layout")
    lines += [
        f"the control loop and its planner used {e.live.control_share:.2%} of a core ({e.policy})"
        for e in entries
        if e.policy == ADAPTIVE
    ]
    reasons = dict.fromkeys(f"INVALID {e.policy}: {reason}" for e in entries for reason in e.live.invalid)
    lines += [*reasons, "", "the running cell against the simulator (live / simulated):", *_aligned(_compared(entries))]
    return "\n".join(lines)


def to_json(entries: Sequence[Entry], pace: str) -> dict[str, Any]:
    """All figures."""
    return {
        "paced": pace,
        "gain": gain(entries),
        "policies": {
            entry.policy: entry.live.to_json()
            | {"switches": entry.switches, "simulated": dataclasses.asdict(entry.simulated)}
            for entry in entries
        },
    }


def _compared(entries: Sequence[Entry]) -> list[list[str]]:
    rows = [["policy", "tier", "attainment", "TTFT p50 ms", "TTFT p99 ms", "TPOT p50 ms", "TPOT p99 ms"]]
    for entry in entries:
        for name, live in entry.live.metrics.tiers.items():
            said = entry.simulated.tiers[name]
            if not live.requests:
                continue
            row = [entry.policy, name, f"{live.attainment:.1%} / {said.attainment:.1%}"]
            for quantity in ("ttft_ms", "tpot_ms"):
                for q in ("p50", "p99"):
                    row.append(_pair(getattr(live, quantity)[q], getattr(said, quantity)[q]))
            rows.append(row)
    return rows


def _pair(live: float | None, said: float | None) -> str:
    return "-" if live is None or said is None else f"{live:.1f} / {said:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
