"""What takes the time of a step: its instructions by kind, the costliest first."""

import collections
import dataclasses
import re
from collections.abc import Sequence

from nitsum_jax.bench.compile.hlo import Instruction
from nitsum_jax.bench.compile.rows import reading
from nitsum_jax.bench.compile.steps import CompiledStep, StepCase

# What all names of operations begin with.
_PREFIX = re.compile(r"^jit\(\w+\)/(shard_map/)?")


@dataclasses.dataclass(frozen=True)
class Cost:
    """All instructions of a step that come from one place of the code and give the same.

    Attributes:
      place: in the code, as JAX names it; empty for what the compiler adds, such as copies to scratch memory.
      opcode: what they do.
      gives: type and shape of the largest result.
      times: how many there are in a step of all layers.
      cycles: of all of them; 0 for a GPU.
      bytes: of main memory, of all of them.
      ms: what these bytes need, or on a TPU the cycles, if that is more.  Bytes of straight code are read beside the
        cycles of other instructions, so a step takes less than the sum.
    """

    place: str
    opcode: str
    gives: str
    times: float
    cycles: float
    bytes: float
    ms: float


def costs(case: StepCase, steps: tuple[CompiledStep, CompiledStep], context: int) -> list[Cost]:
    """Of all layers, from a step at two depths; the costliest first."""
    shallow, deep = (_sums(step, context) for step in steps)
    depths = [step.case.config.num_layers for step in steps]
    more = (case.config.num_layers - depths[1]) / (depths[1] - depths[0])
    chip = case.target.chip
    found = []
    for key in deep.keys() | shallow.keys():
        times, cycles, size = (d + more * (d - s) for s, d in zip(shallow[key], deep[key], strict=True))
        cycles_s = cycles / chip.clock_hz if chip.clock_hz else 0.0
        found.append(Cost(*key, times, cycles, size, 1000 * max(cycles_s, size / chip.bytes_per_s)))
    return sorted(found, key=lambda cost: (-cost.ms, cost.place, cost.gives))


def costs_table(title: str, costs: Sequence[Cost], count: int) -> str:
    """The first of them as Markdown, and what all others come to."""
    lines = [
        f"{title}: what takes the time, all layers.",
        "",
        "| ms | kcycles | MB | times | operation | gives | place |",
        "|---|---|---|---|---|---|---|",
    ]
    shown, rest = list(costs[:count]), costs[count:]
    if rest:
        numbers = [(cost.times, cost.cycles, cost.bytes, cost.ms) for cost in rest]
        shown.append(Cost(f"{len(rest)} other kinds", "", "", *(sum(column) for column in zip(*numbers, strict=True))))
    for cost in shown:
        cells = (f"{cost.ms:.3f}", f"{cost.cycles / 1e3:.0f}", f"{cost.bytes / 1e6:.1f}", f"{cost.times:.0f}")
        lines.append(f"| {' | '.join((*cells, cost.opcode, cost.gives, cost.place))} |")
    return "\n".join(lines)


def _sums(step: CompiledStep, context: int) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """By place, opcode and result: how often, cycles, bytes."""
    found: dict[tuple[str, str, str], tuple[float, float, float]] = collections.defaultdict(lambda: (0.0, 0.0, 0.0))
    for one, work, times in reading(step, context).instructions():
        key = (_place(one), one.opcode, _gives(one))
        count, cycles, size = found[key]
        found[key] = (count + times, cycles + times * work.cycles, size + times * work.bytes)
    return found


def _place(one: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', one.attributes)
    return _PREFIX.sub("", name[1]) if name else ""


def _gives(one: Instruction) -> str:
    if not one.buffers:
        return ""
    largest = max(one.buffers, key=lambda buffer: buffer.bytes)
    return f"{largest.kind}{list(largest.dims)}".replace(" ", "")
