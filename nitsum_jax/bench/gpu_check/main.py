"""nitsum-bench gpu-check: whether an accelerator computes what it should, and how near its steps are to the limit.

Random weights, no downloads.  Models are timed with a few layers at two depths; the time of all layers is extrapolated
from the two (the step is linear in the layers).  With --json the results are written after every part, and a run that
was stopped goes on where it ended.  A part for which no time is left is left out, and said so.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from absl import flags

from nitsum_jax.bench.gpu_check import ceilings, checks, shapes
from nitsum_jax.bench.gpu_check.findings import CheckFindings, CheckRow, CheckVerdict, Surroundings, load
from nitsum_jax.bench.gpu_check.plan import FULL, QUICK, CheckPlan, TimedShape
from nitsum_jax.bench.gpu_check.report import decide, report
from nitsum_jax.bench.gpu_check.timed_step import TimedModel, program_of
from nitsum_jax.engine.step.forms import AttentionForm
from nitsum_jax.engine.step.packing import StepShape
from nitsum_jax.errors import PreconditionError, one_line
from nitsum_jax.server import cli

_ONE_DEVICE = "it takes two devices"


@dataclasses.dataclass(frozen=True)
class GpuCheckOptions:
    """What the flags say."""

    platform: str
    devices: int | None
    quick: bool
    minutes: float
    json: pathlib.Path | None
    markdown: pathlib.Path | None
    fresh: bool


@dataclasses.dataclass(frozen=True)
class CheckPart:
    """A piece of a check that gives one result.

    Attributes:
      name: under which the result is kept.
      do: gets it, and adds it to the findings.
      is_check: an error is then a result: it did not pass.
    """

    name: str
    do: Callable[[CheckFindings], None]
    is_check: bool = False


def read_options(argv: Sequence[str]) -> GpuCheckOptions:
    """Parses the command line.

    Raises:
      HelpRequested: help is asked for.
      InvalidInputError: the command line is wrong.
    """
    values = flags.FlagValues()
    flags.DEFINE_enum("platform", "gpu", ["gpu", "tpu", "cpu"], "which devices to check", flag_values=values)
    flags.DEFINE_integer("devices", None, "use so many of them; all if not given", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("quick", False, "a tiny model: whether everything runs, not how fast", flag_values=values)
    flags.DEFINE_float("minutes", 7.0, "begin nothing new after so long", lower_bound=0.1, flag_values=values)
    flags.DEFINE_string(
        "json", None, "file for all results as JSON; a run goes on with what it has already", flag_values=values
    )
    flags.DEFINE_string("markdown", None, "file for the tables, which are printed too", flag_values=values)
    flags.DEFINE_bool("fresh", False, "begin anew, whatever the file of --json has", flag_values=values)
    cli.parse(values, argv, __doc__ or "")
    as_json, markdown = (None if name is None else pathlib.Path(name) for name in (values.json, values.markdown))
    return GpuCheckOptions(
        values.platform, values.devices, values.quick, values.minutes, as_json, markdown, values.fresh
    )


def run(argv: Sequence[str]) -> None:
    """Checks, measures, prints and writes; see the module.

    Raises:
      InvalidInputError: the file of --json cannot be gone on with.
      PreconditionError: there is no such device, or what must be true is not.
    """
    options = read_options(argv)
    try:
        devices = tuple(jax.devices(options.platform))[: options.devices]
    except RuntimeError:
        raise PreconditionError(
            f"JAX finds no {options.platform} here: run this on a machine with one (make gpu-check EXTRA=cuda12), or "
            "try --platform=cpu --quick"
        ) from None
    end = time.monotonic() + 60 * options.minutes
    surroundings = Surroundings.of(devices, quick=options.quick)
    found = CheckFindings(surroundings)
    if options.json is not None and not options.fresh:
        found = load(options.json, surroundings)
        if found.parts():
            cli.err(f"{options.json} has {found.parts()} parts already: the others follow")
    run_parts(list(all_parts(devices, QUICK if options.quick else FULL, quick=options.quick)), found, end, options)
    cli.out(report(found))
    failed = [name for name, verdict in found.checks.items() if not verdict.passed]
    if failed:
        raise PreconditionError(f"not as it must be on {devices[0].device_kind}: {', '.join(failed)}")


def all_parts(devices: Sequence[jax.Device], plan: CheckPlan, *, quick: bool) -> Iterator[CheckPart]:
    """Everything there is to find out, in the order in which it is done."""
    device = devices[0]

    def check(name: str, what: Callable[[], checks.Found]) -> CheckPart:
        def do(found: CheckFindings) -> None:
            found.checks[name] = CheckVerdict(*what())

        return CheckPart(name, do, is_check=True)

    yield check("zero-copy wrapping", lambda: checks.pointers(devices))
    for dtype in ("float32", "bfloat16"):
        yield check(f"numerics in {dtype}", functools.partial(checks.numerics, device, dtype))
        yield check(f"bits of a row in {dtype}", functools.partial(checks.rows_keep_their_bits, device, dtype))
    yield check("attention kernel", lambda: checks.kernel_agrees(device))
    several = len(devices) > 1
    for dtype in ("float32", "bfloat16"):
        name = f"bits at every TP in {dtype}"
        every = functools.partial(checks.every_tp_gives_the_same_bits, devices, dtype)
        yield check(name, every) if several else _left_out(name, _ONE_DEVICE)
    name = "switches in a stream"
    yield check(name, lambda: checks.switches_change_nothing(devices)) if several else _left_out(name, _ONE_DEVICE)

    def measure(found: CheckFindings) -> None:
        found.ceilings = ceilings.measure(device, quick=quick)

    yield CheckPart("ceilings", measure)
    first = plan.models[0]
    program = program_of(first, 1, "bfloat16", device.platform, max_batch=1, max_len=plan.context, attention="auto")
    for timing in plan.timings(kernel=program.forms.attention is not AttentionForm.XLA):
        yield CheckPart(timing.name, functools.partial(_add_row, plan, device, timing))


def run_parts(parts: Sequence[CheckPart], found: CheckFindings, end: float, options: GpuCheckOptions) -> None:
    """Does what has no result yet, one after the other, and writes the files after each.

    Args:
      parts: in order.
      found: what is there; grows.
      end: nothing new is begun after this time (time.monotonic).
      options: which files are written.
    """
    for number, part in enumerate(parts, 1):
        if part.name in found.checks or part.name in found.steps or (part.name == "ceilings" and found.ceilings):
            continue
        start = time.monotonic()
        if start > end:
            found.left_out[part.name] = "no time left"
            continue
        try:
            part.do(found)
        except Exception as error:  # a compiler's or a driver's, of whatever type: no reason to lose the other parts
            why = one_line(f"{type(error).__name__}: {error}", 160)
            if part.is_check:
                found.checks[part.name] = CheckVerdict(False, why)
            else:
                found.left_out[part.name] = why
        cli.err(f"part {number} of {len(parts)}, {part.name}: {time.monotonic() - start:.1f} s")
        _write(found, options)
    _write(found, options)


def _left_out(name: str, why: str) -> CheckPart:
    def do(found: CheckFindings) -> None:
        found.left_out[name] = why

    return CheckPart(name, do)


def _add_row(plan: CheckPlan, device: jax.Device, timing: TimedShape, found: CheckFindings) -> None:
    if found.ceilings is None:
        raise PreconditionError("the ceilings of the device were not measured")
    part = shapes.slice_of(timing.config, timing.tp)
    times = []
    for depth in plan.depths:
        model = TimedModel(
            shapes.with_layers(part, depth),
            timing.vshards,
            "bfloat16",
            [device],
            max_batch=timing.batch,
            max_len=timing.context + timing.tokens + 1,
            attention=timing.attention,
        )
        times.append(model.step_ms(StepShape(timing.batch, timing.tokens), timing.context))
        attention = str(model.program.forms.attention)
        del model
    layer = (times[1] - times[0]) / (plan.depths[1] - plan.depths[0])
    found.steps[timing.name] = CheckRow(
        timing.config.name,
        timing.what,
        timing.tp,
        timing.vshards,
        timing.batch,
        timing.tokens,
        timing.context,
        attention,
        step_ms=times[0] + layer * (timing.config.num_layers - plan.depths[0]),
        roofline_ms=ceilings.roofline_ms(
            part, found.ceilings, batch=timing.batch, tokens=timing.tokens, context=timing.context
        ),
    )


def _write(found: CheckFindings, options: GpuCheckOptions) -> None:
    if options.markdown is not None:
        options.markdown.write_text(report(found) + "\n", encoding="utf-8")
    if options.json is not None:
        content = found.as_json() | {"vshard_buffers": dataclasses.asdict(decide(found.steps.values()))}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
