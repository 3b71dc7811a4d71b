"""What decode.py makes of its measurements: medians, ratios, the distance to the physical limit, and a table."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from nitsum_jax.bench.compile.operations import OperationCounts

ENGINE, BARE, TRANSFORMERS, LLAMA_CPP = "engine", "bare executable", "transformers", "llama.cpp"
RATIOS = (BARE, TRANSFORMERS, LLAMA_CPP)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed run.

    Attributes:
      round: runs of one round follow each other at once, so that they see the same machine.
      batch: B, sequences.
      name: what ran.
      decode: tokens/s of all sequences together, once all of them have their first token.
      total: tokens/s from the arrival of the prompts on; None where there is no such thing.
    """

    round: int
    batch: int
    name: str
    decode: float
    total: float | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """The runs of one thing at one batch.

    Attributes:
      batch: B.
      name: what ran.
      decode: median tokens/s of the decode phase.
      slowest: least tokens/s of the decode phase.
      fastest: most tokens/s of the decode phase.
      total: median tokens/s with prefill, or None.
      step_ms: median time in which every sequence gets a token.
      limit_share: how near that comes to the physical limit, 1 being the limit; None if the limit is another's.
      engine_ratio: the engine's tokens/s over this one's; None for the engine itself.
    """

    batch: int
    name: str
    decode: float
    slowest: float
    fastest: float
    total: float | None
    step_ms: float
    limit_share: float | None
    engine_ratio: float | None


def ratio(samples: Sequence[Sample], batch: int, over: str, under: str) -> float | None:
    """Median over the rounds of one thing's decode tokens/s by another's of the same round; None if one never ran.

    Within a round the machine's speed hardly changes, so this tells more than a ratio of medians.
    """
    by_round: dict[tuple[str, int], float] = {(s.name, s.round): s.decode for s in samples if s.batch == batch}
    pairs = [(value, by_round.get((under, r))) for (name, r), value in by_round.items() if name == over]
    ratios = [value / other for value, other in pairs if other]
    return statistics.median(ratios) if ratios else None


def rows(samples: Sequence[Sample], limits_ms: Mapping[str, float]) -> list[Row]:
    """One row per batch and thing, in the order in which they first ran.

    Args:
      samples: all runs.
      limits_ms: least time of a step, of those whose limit is known.
    """
    found = []
    for batch, name in dict.fromkeys((s.batch, s.name) for s in sorted(samples, key=lambda s: s.batch)):
        mine = [s for s in samples if (s.batch, s.name) == (batch, name)]
        decode = statistics.median(s.decode for s in mine)
        totals = [s.total for s in mine if s.total is not None]
        step_ms = 1000 * batch / decode
        found.append(
            Row(
                batch=batch,
                name=name,
                decode=decode,
                slowest=min(s.decode for s in mine),
                fastest=max(s.decode for s in mine),
                total=statistics.median(totals) if totals else None,
                step_ms=step_ms,
                limit_share=limits_ms[name] / step_ms if name in limits_ms else None,
                engine_ratio=None if name == ENGINE else ratio(samples, batch, ENGINE, name),
            )
        )
    return found


def table(found: Sequence[Row]) -> str:
    """The rows for people."""
    head = ("batch", "what", "decode tok/s", "slowest..fastest", "with prefill", "ms/step", "of limit", "engine / this")
    lines = [head]
    for row in found:
        lines.append(
            (
                str(row.batch),
                row.name,
                f"{row.decode:.1f}",
                f"{row.slowest:.1f}..{row.fastest:.1f}",
                "-" if row.total is None else f"{row.total:.1f}",
                f"{row.step_ms:.2f}",
                "-" if row.limit_share is None else f"{row.limit_share:.0%}",
                "-" if row.engine_ratio is None else f"{row.engine_ratio:.2f}",
            )
        )
    return align(lines)


def explained(found: OperationCounts, layers: int, step_ms: float) -> str:
    """One line on what a decode step consists of; everything outside the layers is shared out among them.

    Args:
      found: operations of the step; those in loops over old tokens count once.
      layers: of the model.
      step_ms: what a step takes.
    """
    looped = sum(found.looped.values())
    return (
        f"{found.total} operations a step ({found.fusions} fusions; {looped} in loops over old tokens), "
        f"{found.total / layers:.1f} operations and {step_ms / layers:.3f} ms a layer, "
        f"{1000 * step_ms / found.total:.1f} us an operation"
    )


def align(lines: Sequence[Sequence[str]]) -> str:
    """Columns of text: the second to the left, all others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
