"""The findings as tables, and what follows from them."""

import dataclasses
from collections.abc import Iterable

from nitsum_jax.bench.gpu_check.findings import CheckFindings, CheckRow

# What separate vshard buffers may cost a decode step, as a part of it.
_BUFFERS_MAY_COST = 0.05


@dataclasses.dataclass(frozen=True)
class FormDecision:
    """Whether separate vshard buffers are worth it here.

    Attributes:
      cost: K -> what they add to a decode step with K on the device, as a part of the step with one; the worst batch.
      vshards: the largest K that costs no more than may be; None if K was not measured.
      text: the decision in a line.
    """

    cost: dict[int, float]
    vshards: int | None
    text: str


def decide(rows: Iterable[CheckRow]) -> FormDecision:
    """Chooses K by what was measured: how many vshard buffers a device at TP 1 can have at little cost."""
    decodes = [row for row in rows if (row.what, row.tp) == ("decode", 1)]
    fused = {(row.model, row.batch, row.attention): row.step_ms for row in decodes if row.vshards == 1}
    cost: dict[int, float] = {}
    for row in decodes:
        base = fused.get((row.model, row.batch, row.attention))
        if row.vshards > 1 and base:
            cost[row.vshards] = max(cost.get(row.vshards, -1.0), row.step_ms / base - 1)
    if not cost:
        return FormDecision(cost, None, "Vshard buffers were not measured: no decision.")
    listing = ", ".join(f"K={k} {part:+.1%}" for k, part in sorted(cost.items()))
    good = [k for k, part in cost.items() if part <= _BUFFERS_MAY_COST]
    best = max(good, default=1)
    if best == max(cost):
        text = f"Separate vshard buffers cost little here ({listing}): keep them, with any K."
    else:
        text = (
            f"Separate vshard buffers cost more than {_BUFFERS_MAY_COST:.0%} here ({listing}): start servers with "
            f"--vshards={best}; that fuses the weights to {best} buffer{'s' if best > 1 else ''} per parameter at "
            f"TP 1, and makes TP {best} the largest."
        )
    return FormDecision(cost, best, text)


def report(found: CheckFindings) -> str:
    """All results as Markdown."""
    where, limits = found.surroundings, found.ceilings
    head = f"{where.devices} x {where.device}, JAX {where.jax_version}, nitsum-jax {where.version}"
    if limits is not None:
        head += (
            f"; ceilings of the run: {limits.bytes_per_s / 1e9:.0f} GB/s, {limits.flops_per_s / 1e12:.1f} TFLOP/s in "
            "bfloat16"
        )
    lines = [
        f"{head}.",
        "",
        "| check | passed | found |",
        "|---|---|---|",
        *(f"| {name} | {'yes' if one.passed else 'NO'} | {one.found} |" for name, one in found.checks.items()),
        "",
        "| model | step | device of TP | K | batch | new tokens | context | attention "
        "| ms | roofline, ms | of roofline | of K=1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = list(found.steps.values())
    fused = {(r.model, r.what, r.tp, r.batch, r.tokens, r.attention): r.step_ms for r in rows if r.vshards == 1}
    for row in rows:
        base = fused.get((row.model, row.what, row.tp, row.batch, row.tokens, row.attention))
        lines.append(
            f"| {row.model} | {row.what} | {row.tp} | {row.vshards} | {row.batch} | {row.tokens} | {row.context} "
            f"| {row.attention} | {row.step_ms:.3f} | {row.roofline_ms:.3f} | {row.roofline_ms / row.step_ms:.0%} "
            f"| {f'{row.step_ms / base:.3f}' if base else '-'} |"
        )
    lines += ["", decide(rows).text]
    if found.left_out:
        lines += ["", "Left out: " + "; ".join(f"{name}: {why}" for name, why in found.left_out.items()) + "."]
    return "\n".join(lines)
