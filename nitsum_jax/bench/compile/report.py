"""The table of estimates."""

from collections.abc import Sequence

from nitsum_jax.bench.compile.rows import StepEstimate
from nitsum_jax.bench.compile.targets import Chip

SCHEMA = "nitsum-compile/1"
_HEAD = (
    "step",
    "TP",
    "batch x tokens",
    "context",
    "HBM GB",
    "Mcycles",
    "launches",
    "collectives",
    "received MB",
    "fixed / fast MB",
    "links ms",
    "temp MB",
    "fits",
    "roofline ms",
    "estimate ms",
    "apart ms",
    "ratio",
)


def table(rows: Sequence[StepEstimate], chip: Chip) -> str:
    """All estimates as Markdown; one target and model."""
    first = rows[0]
    cycles, launches = chip.platform == "tpu", chip.platform == "gpu"
    lines = [
        f"{first.model} on {first.target}, attention {first.attention}, reduction {first.reduction}: estimates of the "
        "compiler, per device.",
        "",
        f"| {' | '.join(_HEAD)} |",
        f"|{'---|' * len(_HEAD)}",
    ]
    for row in rows:
        cells = (
            row.what,
            str(row.tp),
            f"{row.batch} x {row.tokens}{f' + {row.beside} x 1' if row.beside else ''}",
            str(row.context),
            f"{row.hbm_bytes / 1e9:.2f}",
            f"{row.cycles / 1e6:.2f}" if cycles else "-",
            f"{row.launches:.0f}" if launches else "-",
            f"{row.exchanges:.0f}",
            f"{row.received_bytes / 1e6:.1f}",
            f"{row.received_fixed / 1e6:.1f} / {row.received_fast / 1e6:.1f}",
            f"{row.link_ms:.2f}",
            f"{row.temp_bytes / 1e6:.0f}",
            "yes" if row.fits else "NO",
            f"{row.roofline_ms:.2f}",
            f"{row.estimate_ms:.2f}",
            _apart(row, rows),
            f"{row.ratio:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _apart(row: StepEstimate, rows: Sequence[StepEstimate]) -> str:
    """Milliseconds of the two steps that do what a mixed one does, if they are among the rows."""
    if not row.beside:
        return "-"

    def ms(what: str, batch: int, tokens: int) -> float | None:
        asked = (what, row.tp, batch, tokens, row.context)
        return next((r.estimate_ms for r in rows if (r.what, r.tp, r.batch, r.tokens, r.context) == asked), None)

    decode, prefill = ms("decode", row.beside, 1), ms("prefill", row.batch, row.tokens)
    return "-" if decode is None or prefill is None else f"{decode + prefill:.2f}"
