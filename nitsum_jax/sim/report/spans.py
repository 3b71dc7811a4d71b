"""Which instances a cell had over time, from the logs."""

import dataclasses
from collections.abc import Sequence

from nitsum_jax.errors import NitsumError
from nitsum_jax.meshes.layout import MOST_DEVICES, parse_layout
from nitsum_jax.sim.runs.logs import RunLogs
from nitsum_jax.sim.runs.tables import StepTable, rows_by


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """An instance, for as long as it was there.

    Attributes:
      start_s, end_s: seconds.
      devices: its devices, ascending.
      role: mixed, prefill or decode.
    """

    start_s: float
    end_s: float
    devices: tuple[int, ...]
    role: str

    @property
    def tp(self) -> int:
        """Its tensor-parallel degree."""
        return len(self.devices)

    def runs(self) -> list[tuple[int, int]]:
        """Its devices as (first, count) of neighbours, as they are drawn."""
        found: list[tuple[int, int]] = []
        for device in sorted(self.devices):
            if found and sum(found[-1]) == device:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((device, 1))
        return found


def spans_of(logs: RunLogs, end_s: float) -> list[Span]:
    """All instances of a run, in order of their start.

    Layouts are read from the switches and, before the first one, from the summary.  Where one cannot be read, an
    instance is there from its first step to its last.

    Args:
      logs: of the run.
      end_s: the last instances are there until then.
    """
    first = logs.switches[0].from_layout if logs.switches else str(logs.summary.get("layout", ""))
    layouts = [_parsed(text) for text in (first, *(s.to_layout for s in logs.switches))]
    if not all(layouts):
        return _from_steps(logs.steps)
    # What a switch does not touch goes on; what it stopped comes back after the stall.
    open_since: dict[tuple[tuple[int, ...], str], float] = dict.fromkeys(layouts[0], 0.0)
    spans = []
    for switch, layout in zip(logs.switches, layouts[1:], strict=True):
        touched = set(switch.devices)
        for key in list(open_since):
            if key not in layout or touched.intersection(key[0]):
                spans.append(Span(open_since.pop(key), switch.time_s, *key))
        for key in layout:
            open_since.setdefault(key, switch.time_s + switch.stall_s)
    spans += [Span(since, end_s, *key) for key, since in open_since.items()]
    return sorted((s for s in spans if s.end_s > s.start_s), key=lambda s: (s.start_s, s.devices))


def _parsed(text: str) -> list[tuple[tuple[int, ...], str]]:
    """(devices, role) of each instance of a layout's text; nothing if it cannot be read."""
    try:
        return [(i.devices, i.role.value) for i in parse_layout(text, MOST_DEVICES).instances]
    except NitsumError:
        return []


def _from_steps(steps: StepTable) -> list[Span]:
    roles = steps.roles()
    spans = []
    for instance, rows in rows_by(steps.instance).items():
        devices = steps.groups[int(steps.group[rows[0]])]
        spans.append(Span(float(steps.start_s[rows].min()), float(steps.end_s[rows].max()), devices, roles[instance]))
    return sorted(spans, key=lambda s: (s.start_s, s.devices))


def nice_interval(seconds: float, rate: float, *, pieces: int = 100, requests: float = 20.0) -> float:
    """A round interval that cuts `seconds` into at most `pieces`, with `requests` requests in each on average."""
    least = max(seconds / pieces, requests / rate if rate > 0 else 0.0)
    return min(seconds, next((s for s in _ROUND if s >= least), seconds))


_ROUND: Sequence[float] = (
    *(0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 20, 30),
    *(60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 86400),
)
