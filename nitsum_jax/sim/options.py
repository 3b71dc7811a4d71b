"""Flags of `nitsum-simulate`."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from absl import flags

from nitsum_jax.control.model.cell import MAX_BATCH
from nitsum_jax.control.routing.routers import ROUTERS
from nitsum_jax.errors import InvalidInputError

USAGE = """nitsum-simulate: what a cell would do with a workload under a policy.

  nitsum-simulate --profile=llama-3.1-8b-h100 --out=run
  nitsum-simulate --profile=qwen2.5-32b-h200 --trace=chat:conv.csv:azure --trace=code:code.csv --tiers=tiers.toml \\
      --policies=adaptive,static,sarathi --rate_scale=3 --seconds=600 --out=run
  nitsum-simulate --profile=qwen2.5-32b-h200 --tiers=tiers.toml --replay=run/decisions.jsonl
  nitsum-simulate --profile=llama-3.1-8b-h100 --cells=8 --devices=2 --policy=tp1x2 --rate_scale=60 --report_s=1
  nitsum-simulate --audit=run"""

_PLAIN = (
    *("profile", "tiers", "devices", "rate_scale", "seconds", "seed", "out", "compile_s", "switch"),
    *("max_batch", "capacity", "steps", "progress", "replay", "audit", "cells"),
    *("report_s", "continued", "doors"),
)
PLANNER = "planner"
DEFAULT_TRACES = ("chat:azure-conv-like", "code:azure-code-like")


@dataclasses.dataclass(frozen=True)
class SimulateOptions:
    """What the flags say; see `_define`."""

    profile: str | None
    trace: tuple[str, ...]
    tiers: str | None
    devices: int
    policies: tuple[str, ...]
    rate_scale: float
    seconds: float | None
    seed: int
    out: str | None
    compile_s: float
    switch: str
    max_batch: int
    capacity: bool
    steps: bool
    progress: bool
    replay: str | None
    audit: str | None
    cells: int = 1
    routers: tuple[str, ...] = ()
    report_s: float = 0.1
    continued: float = 0.5
    doors: int = 1
    dedicate: tuple[tuple[str, int, str | None], ...] = ()
    planned: bool = False


class UsageRequested(Exception):  # noqa: N818  not an error
    """The user asked for help; the message is the help text."""


def _define() -> flags.FlagValues:
    values = flags.FlagValues()

    def add(define: object, *arguments: object, **more: object) -> None:
        define(*arguments, flag_values=values, **more)  # type: ignore[operator]

    add(flags.DEFINE_string, "profile", None, "Name of a profile that comes with the package, or a .json file.")
    add(
        flags.DEFINE_multi_string,
        "trace",
        None,
        "TIER:FILE or TIER:FILE:FORMAT, may be repeated (docs/simulator/workloads.md); or a stand-in's name instead"
        f" of a file. Without any: {' and '.join(DEFAULT_TRACES)}, drawn from the seed.",
    )
    add(
        flags.DEFINE_string,
        "tiers",
        None,
        "TOML file with the tiers' targets; without it chat and code have default ones.",
    )
    add(flags.DEFINE_integer, "devices", 8, "Devices of the cell.", lower_bound=1)
    add(
        flags.DEFINE_string,
        "policy",
        None,
        "adaptive (the default), a family of baselines (its best settings are searched), an ablation, or a layout as"
        " tp4+tp2x2/chat; an unknown name lists them.",
    )
    add(
        flags.DEFINE_string,
        "policies",
        None,
        "Several policies to compare, commas between them, or semicolons where a layout has commas of its own; with"
        " `+bound` for the upper bound.",
    )
    add(flags.DEFINE_float, "rate_scale", 1.0, "Factor on the rate; burstiness is kept.")
    add(flags.DEFINE_float, "seconds", None, "Length of the workload; the traces' own if left out.")
    add(flags.DEFINE_integer, "seed", 0, "Seed of everything that is random.", lower_bound=0)
    add(flags.DEFINE_string, "out", None, "Folder of summary.json, the logs and report.html.")
    add(
        flags.DEFINE_float,
        "compile_s",
        20.0,
        "Seconds to compile for a device group that is used for the first time; 0 with a warm cache.",
        lower_bound=0.0,
    )
    add(
        flags.DEFINE_enum,
        "switch",
        "resident",
        ["resident", "device_put"],
        "Switches find the weights in place, or reshard them by the general path.",
    )
    add(flags.DEFINE_integer, "max_batch", MAX_BATCH, "Most requests of an instance.", lower_bound=1)
    add(
        flags.DEFINE_integer,
        "cells",
        1,
        "Cells behind a router, each with --devices devices and the layout that --policy names; a table of --router is"
        " printed, and no logs are written.",
        lower_bound=1,
    )
    add(
        flags.DEFINE_list,
        "router",
        None,
        f"With --cells: which routers, of {', '.join(ROUTERS)}; all of them if left out.",
    )
    add(flags.DEFINE_float, "report_s", 0.1, "With --cells: seconds between a cell's reports.", lower_bound=0.001)
    add(
        flags.DEFINE_integer,
        "doors",
        1,
        "With --cells: routers that know nothing of each other; requests come to them in turn.",
        lower_bound=1,
    )
    add(
        flags.DEFINE_float,
        "continued",
        0.5,
        "With --cells: share of the requests that go on with an earlier conversation, whose text a cell may hold.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    add(
        flags.DEFINE_list,
        "dedicate",
        None,
        "With --cells: TIER:CELLS or TIER:CELLS:LAYOUT, cells that take the requests of one tier and no others; the"
        f" other tiers share the rest; or {PLANNER}: what the fleet planner says, which is told of the whole workload.",
    )
    add(flags.DEFINE_bool, "capacity", False, "Find the highest rate at which 90 % meet both targets, by bisection.")
    add(flags.DEFINE_bool, "steps", True, "Write steps.jsonl (a line for each step: a gigabyte for hours).")
    add(flags.DEFINE_bool, "progress", True, "Show a bar on long runs.")
    add(flags.DEFINE_string, "replay", None, "Make the decisions of this decisions.jsonl again and compare.")
    add(
        flags.DEFINE_string,
        "audit",
        None,
        "Check the logs in this folder of a finished run (docs/simulator/logs.md); profile and targets are those that"
        " its summary names unless --profile and --tiers are given. Exit status 1 if something is wrong.",
    )
    return values


def parse(argv: Sequence[str]) -> SimulateOptions:
    """Reads the command line.

    Raises:
      HelpRequested: --help is given.
      InvalidInputError: one line.
    """
    values = _define()
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in argv[1:]):
        raise UsageRequested(f"{USAGE}\n\nflags:\n{values.main_module_help()}{values.get_help()}")
    try:
        rest = values(list(argv))
    except flags.Error as e:
        raise InvalidInputError(f"{' '.join(str(e).split())} (--help lists the flags)") from None
    if len(rest) > 1:
        raise InvalidInputError(f"unexpected argument {rest[1]!r}: everything is given by flags (--help lists them)")
    return _options(values)


def _options(values: flags.FlagValues) -> SimulateOptions:
    if values.audit is not None and (
        values.policies or values.policy or values.replay or values.capacity or values.out
    ):
        raise InvalidInputError("--audit runs nothing: leave out all flags but --profile and --tiers")
    if values.profile is None and values.audit is None:
        raise InvalidInputError("--profile is missing: name a profile, such as --profile=llama-3.1-8b-h100")
    for name in ("rate_scale", "seconds"):
        value = values[name].value
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InvalidInputError(f"--{name}={value:g}: give a number above 0")
    if values.policy is not None and values.policies:
        raise InvalidInputError("--policy and --policies are both given: use one of them")
    if values.replay is not None and (values.policies or values.capacity):
        raise InvalidInputError("--replay runs nothing: leave --policies and --capacity out")
    routers = _routers(values)
    policies = _several(values.policies) if values.policies else (values.policy or "adaptive",)
    if len(set(policies)) < len(policies):
        raise InvalidInputError(f"--policies={','.join(policies)}: a policy is named twice")
    plain: dict[str, Any] = {name: values[name].value for name in _PLAIN}
    return SimulateOptions(
        trace=tuple(values.trace or DEFAULT_TRACES),
        policies=policies,
        routers=routers,
        planned=values.dedicate == [PLANNER],
        dedicate=() if values.dedicate == [PLANNER] else _dedicated(values.dedicate or (), values.cells),
        **plain,
    )


def _dedicated(texts: Sequence[str], cells: int) -> tuple[tuple[str, int, str | None], ...]:
    """Tier, number and layout of the cells that take one tier alone."""
    found: dict[str, tuple[str, int, str | None]] = {}
    for text in texts:
        tier, _, rest = text.partition(":")
        count, _, layout = rest.partition(":")
        if not tier or not count.isdecimal() or int(count) < 1:
            raise InvalidInputError(f"--dedicate={text}: give TIER:CELLS or TIER:CELLS:LAYOUT, such as chat:3")
        if tier in found:
            raise InvalidInputError(f"--dedicate names tier {tier} twice")
        found[tier] = (tier, int(count), layout or None)
    asked = sum(count for _, count, _ in found.values())
    if asked > cells:
        raise InvalidInputError(f"--dedicate takes {asked} cells, and --cells={cells} there are: give more cells")
    return tuple(found.values())


def _routers(values: flags.FlagValues) -> tuple[str, ...]:
    """The routers to compare; none for one cell."""
    if values.cells == 1:
        if values.router:
            raise InvalidInputError("--router needs --cells: a router chooses between cells")
        if values.dedicate:
            raise InvalidInputError("--dedicate needs --cells: one cell takes every tier")
        return ()
    if values.policies or values.capacity or values.out or values.replay:
        raise InvalidInputError("--cells compares routers: leave --policies, --capacity, --out and --replay out")
    for name in values.router or ():
        if name not in ROUTERS:
            raise InvalidInputError(f"--router={name} is not known: use {', '.join(ROUTERS)}")
    return tuple(dict.fromkeys(values.router or ROUTERS))


def _several(text: str) -> tuple[str, ...]:
    names = text.split(";" if ";" in text else ",")
    return tuple(name.strip() for name in names)
