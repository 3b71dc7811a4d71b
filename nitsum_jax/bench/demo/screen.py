"""What the demonstration shows while it runs: instances and their load, and how each tier fares."""

import sys
from collections.abc import Callable, Sequence

from nitsum_jax.bench.serve.player import Played
from nitsum_jax.control.job import met
from nitsum_jax.control.tiers import TierSet
from nitsum_jax.server.proto import nitsum_pb2

_WINDOW_S = 10.0
_BAR = 20
_COLOURS = {"mixed": "36", "prefill": "33", "decode": "32"}


def attainments(
    played: Sequence[Played], tiers: TierSet, scale: float, now_s: float, window_s: float = _WINDOW_S
) -> dict[str, tuple[int, int]]:
    """Of the requests that ended in the last seconds of the workload's clock: (met, all), by tier."""
    counts = {tier.name: (0, 0) for tier in tiers}
    for one in played:
        if not one.complete or one.last_s is None or one.first_s is None or one.last_s < (now_s - window_s) * scale:
            continue
        tier = tiers.get(one.request.tier)
        ok = met(tier, one.sent_s / scale, one.first_s / scale, one.last_s / scale, one.request.output_tokens)
        good, every = counts[tier.name]
        counts[tier.name] = good + ok, every + 1
    return counts


class Screen:
    """Draws over its last picture on a terminal; elsewhere writes a line when something changed, at most every 5 s."""

    def __init__(self, write: Callable[[str], object] = sys.stdout.write, terminal: bool | None = None) -> None:
        """Draws nothing yet; `terminal`: whether it can draw over, by the standard output if None."""
        self._write = write
        self._terminal = sys.stdout.isatty() if terminal is None else terminal
        self._lines = 0
        self._last: tuple[str, float] = ("", -1e9)

    def show(
        self, title: str, now_s: float, layout: nitsum_pb2.GetLayoutResponse, shares: dict[str, tuple[int, int]]
    ) -> None:
        """Draws the state at a time of the workload's clock."""
        met_text = ", ".join(f"{name} {_share(*pair)}" for name, pair in shares.items())
        if not self._terminal:
            if layout.layout != self._last[0] or now_s - self._last[1] >= 5:
                self._last = layout.layout, now_s
                self._write(f"PACED {title} {now_s:6.1f} s  {_short(layout)}  met lately: {met_text}\n")
                sys.stdout.flush()
            return
        lines = [f"\x1b[1mPACED at {layout.pace.profile}: {title}, {now_s:.0f} s\x1b[0m"]
        for instance in layout.instances:
            cells = "".join("##" if d in instance.devices else " ." for d in range(len(layout.devices)))
            busy = "#" * round(_BAR * min(1.0, instance.kv_use))
            lines.append(
                f"  \x1b[{_COLOURS.get(instance.role, '0')}m{cells}  tp{instance.tp:<2} {instance.role:<8}\x1b[0m"
                f"{instance.running:4} running  KV [{busy:<{_BAR}}]"
            )
        lines.append(f"  met in the last {_WINDOW_S:g} s: {met_text}; {layout.stats.switches} switches")
        if self._lines:
            self._write(f"\x1b[{self._lines}A")
        self._write("".join(f"\x1b[K{line}\n" for line in lines) + "\x1b[J")
        sys.stdout.flush()
        self._lines = len(lines)

    def done(self) -> None:
        """The next picture goes below."""
        self._lines = 0


def _share(good: int, every: int) -> str:
    return "-" if not every else f"{good / every:.0%}"


def _short(layout: nitsum_pb2.GetLayoutResponse) -> str:
    return " ".join(
        f"tp{i.tp}@{min(i.devices)}-{max(i.devices)}{'' if i.role == 'mixed' else ':' + i.role}({i.running})"
        for i in layout.instances
    )
