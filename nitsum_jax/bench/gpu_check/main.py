"""nitsum-bench gpu-check: whether an accelerator computes what it should, and how near its steps are to the limit.

Random weights, no downloads.  Models are timed with a few layers at two depths; the time of all layers is extrapolated
from the two (the step is linear in the layers).  A section for which no time is left is left out, and said so.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
from absl import flags

from nitsum_jax.bench.gpu_check import ceilings, checks, shapes
from nitsum_jax.bench.gpu_check.timed_step import TimedModel
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import PreconditionError
from nitsum_jax.models.config import ModelConfig
from nitsum_jax.server import cli

SCHEMA = "nitsum-gpu-check/1"
# What separate vshard buffers may cost a decode step, as a part of it.
_BUFFERS_MAY_COST = 0.05


@dataclasses.dataclass(frozen=True)
class GpuCheckOptions:
    """What the flags say."""

    platform: str
    quick: bool
    minutes: float
    json: str | None
    markdown: str | None


@dataclasses.dataclass(frozen=True)
class CheckRow:
    """One timing; milliseconds, of all layers of the model.

    Attributes:
      model: name.
      what: "decode" or "prefill".
      tp: the step is that of one of so many devices, without their exchange.
      vshards: K, separate buffers on the device.
      batch: sequences.
      tokens: new tokens of each.
      context: tokens of each in the cache.
      step_ms: measured.
      roofline_ms: what the ceilings of the run allow.
    """

    model: str
    what: str
    tp: int
    vshards: int
    batch: int
    tokens: int
    context: int
    step_ms: float
    roofline_ms: float


@dataclasses.dataclass(frozen=True)
class CheckPlan:
    """What is timed."""

    models: tuple[ModelConfig, ...]
    depths: tuple[int, int]
    batches: tuple[int, ...]
    context: int
    chunk: int
    vshards: tuple[int, ...]
    slices: tuple[int, ...]


FULL = CheckPlan(
    (shapes.LLAMA_8B, shapes.QWEN_32B), (1, 3), (1, 8, 32, 64, 128, 256), 1024, 512, (1, 2, 4, 8), (2, 4, 8)
)
QUICK = CheckPlan((shapes.TINY,), (1, 2), (4,), 64, 32, (1, 2), (2,))


def read_options(argv: Sequence[str]) -> GpuCheckOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("platform", "gpu", ["gpu", "tpu", "cpu"], "which devices to check", flag_values=values)
    flags.DEFINE_bool("quick", False, "a tiny model: whether everything runs, not how fast", flag_values=values)
    flags.DEFINE_float("minutes", 7.0, "begin nothing new after so long", lower_bound=0.1, flag_values=values)
    flags.DEFINE_string("json", None, "file for all results as JSON", flag_values=values)
    flags.DEFINE_string("markdown", None, "file for the tables, which are printed too", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    return GpuCheckOptions(values.platform, values.quick, values.minutes, values.json, values.markdown)


def run(argv: Sequence[str]) -> None:
    """Checks, measures, prints and writes; see the module.

    Raises:
      PreconditionError: there is no such device, or what must be true is not.
    """
    options = read_options(argv)
    try:
        devices = tuple(jax.devices(options.platform))
    except RuntimeError:
        raise PreconditionError(
            f"JAX finds no {options.platform} here: run this on a machine with one (make gpu-check EXTRA=cuda12), or "
            "try --platform=cpu --quick"
        ) from None
    end = time.monotonic() + 60 * options.minutes
    plan = QUICK if options.quick else FULL
    verdicts = {"zero-copy wrapping": checks.pointers(devices)}
    for dtype in ("float32", "bfloat16"):
        verdicts[f"numerics in {dtype}"] = checks.numerics(devices[0], dtype)
    limits = ceilings.measure(devices[0], quick=options.quick)
    rows: list[CheckRow] = []
    left_out = _time_all(plan, devices[0], limits, end, rows)
    text = report(devices, verdicts, limits, rows, left_out)
    cli.out(text)
    if options.markdown is not None:
        pathlib.Path(options.markdown).write_text(text + "\n", encoding="utf-8")
    if options.json is not None:
        _write_json(options.json, devices, verdicts, limits, rows, left_out)
    failed = [name for name, (good, _) in verdicts.items() if not good]
    if failed:
        raise PreconditionError(f"not as it must be on {devices[0].device_kind}: {', '.join(failed)}")


def _time_all(
    plan: CheckPlan, device: jax.Device, limits: ceilings.Ceilings, end: float, rows: list[CheckRow]
) -> list[str]:
    """Times what there is time for, the most telling first; returns what was left out."""
    left_out = []
    jobs: list[tuple[str, Callable[[], None]]] = []

    def job(config: ModelConfig, tp: int, vshards: int, batch: int, tokens: int, context: int) -> None:
        what = "decode" if tokens == 1 else "prefill"
        name = f"{what} of {config.name}, batch {batch}, TP {tp}, K={vshards}"
        jobs.append(
            (name, lambda: rows.append(_row(plan, device, limits, config, tp, vshards, batch, tokens, context)))
        )

    two = dict.fromkeys((plan.batches[0], plan.batches[min(2, len(plan.batches) - 1)]))
    for config in plan.models:
        for batch in plan.batches:
            job(config, 1, 1, batch, 1, plan.context)
        job(config, 1, 1, 1, plan.chunk, 0)
    for config in plan.models[:1]:
        for vshards in plan.vshards[1:]:
            for batch in two:
                job(config, 1, vshards, batch, 1, plan.context)
        for tp in plan.slices:
            for batch in two:
                job(config, tp, 1, batch, 1, plan.context)
    for name, do in jobs:
        if time.monotonic() > end:
            left_out.append(f"{name}: no time left")
            continue
        try:
            do()
        except jax.errors.JaxRuntimeError as error:  # too little memory for one of them is no reason to lose the others
            left_out.append(f"{name}: {str(error).splitlines()[0][:120]}")
    return left_out


def _row(
    plan: CheckPlan,
    device: jax.Device,
    limits: ceilings.Ceilings,
    config: ModelConfig,
    tp: int,
    vshards: int,
    batch: int,
    tokens: int,
    context: int,
) -> CheckRow:
    part = shapes.slice_of(config, tp)
    length = context + tokens + 1
    times = []
    for depth in plan.depths:
        model = TimedModel(
            shapes.with_layers(part, depth), vshards, "bfloat16", device, max_batch=batch, max_len=length
        )
        times.append(model.step_ms(StepShape(batch, tokens), context))
        del model
    layer = (times[1] - times[0]) / (plan.depths[1] - plan.depths[0])
    whole = times[0] + layer * (config.num_layers - plan.depths[0])
    bound = ceilings.roofline_ms(part, limits, batch=batch, tokens=tokens, context=context)
    what = "decode" if tokens == 1 else "prefill"
    return CheckRow(config.name, what, tp, vshards, batch, tokens, context, whole, bound)


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


def decide(rows: Sequence[CheckRow]) -> FormDecision:
    """Chooses K by what was measured: how many vshard buffers a device at TP 1 can have at little cost."""
    fused = {(r.model, r.batch): r.step_ms for r in rows if (r.what, r.tp, r.vshards) == ("decode", 1, 1)}
    cost: dict[int, float] = {}
    for row in rows:
        base = fused.get((row.model, row.batch))
        if (row.what, row.tp) == ("decode", 1) and row.vshards > 1 and base:
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


def report(
    devices: Sequence[jax.Device],
    verdicts: dict[str, tuple[bool, str]],
    limits: ceilings.Ceilings,
    rows: Sequence[CheckRow],
    left_out: Sequence[str],
) -> str:
    """All results as Markdown."""
    lines = [
        f"{len(devices)} x {devices[0].device_kind}, JAX {jax.__version__}; ceilings of the run: "
        f"{limits.bytes_per_s / 1e9:.0f} GB/s, {limits.flops_per_s / 1e12:.1f} TFLOP/s in bfloat16.",
        "",
        "| check | passed | found |",
        "|---|---|---|",
        *(f"| {name} | {'yes' if good else 'NO'} | {found} |" for name, (good, found) in verdicts.items()),
        "",
        "| model | step | device of TP | K | batch | new tokens | context | ms | roofline, ms | of roofline | of K=1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    fused = {(r.model, r.what, r.tp, r.batch): r.step_ms for r in rows if r.vshards == 1}
    for row in rows:
        base = fused.get((row.model, row.what, row.tp, row.batch))
        lines.append(
            f"| {row.model} | {row.what} | {row.tp} | {row.vshards} | {row.batch} | {row.tokens} | {row.context} "
            f"| {row.step_ms:.3f} | {row.roofline_ms:.3f} | {row.roofline_ms / row.step_ms:.0%} "
            f"| {f'{row.step_ms / base:.3f}' if base else '-'} |"
        )
    lines += ["", decide(rows).text]
    if left_out:
        lines += ["", "Left out: " + "; ".join(left_out) + "."]
    return "\n".join(lines)


def _write_json(
    path: str,
    devices: Sequence[jax.Device],
    verdicts: dict[str, tuple[bool, str]],
    limits: ceilings.Ceilings,
    rows: Sequence[CheckRow],
    left_out: Sequence[str],
) -> None:
    content = {
        "schema": SCHEMA,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "jax": jax.__version__,
        "ceilings": dataclasses.asdict(limits),
        "checks": {name: {"passed": good, "found": found} for name, (good, found) in verdicts.items()},
        "steps": [dataclasses.asdict(row) for row in rows],
        "vshard_buffers": dataclasses.asdict(decide(rows)),
        "left_out": list(left_out),
    }
    pathlib.Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
